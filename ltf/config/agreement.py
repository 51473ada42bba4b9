"""What two settings must agree on. Pure: no file, no device, a number of ranks only where it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ltf.config.errors import ConfigError, Mistake
from ltf.config.schema import Answer, AttentionKernel, Config, PipelineSchedule, Recompute, Source
from ltf.parallel import stages
from ltf.parallel.layout import Layout, LayoutError


def check(config: Config) -> None:
    """ConfigError with every disagreement that needs no number of ranks. `read` has called it already."""
    if found := disagreements(config):
        raise ConfigError(found)


def disagreements(config: Config) -> list[Mistake]:
    """As `check`, as values; `where` is empty, `field` the setting to change first."""
    return [
        *_pipeline(config),
        *_experts(config),
        *_batch(config),
        *_data(config),
        *_optimizer(config),
        *_checkpoints(config),
        *_kernels(config),
    ]


def check_data(config: Config) -> None:
    """ConfigError unless there is something to train on: an estimate needs no data, a run does."""
    if not config.data.sources:
        fix = "for example --set data.sources.0.prefix=corpus/books"
        raise ConfigError([Mistake("", "data.sources", "no source", "at least one `prefix`", fix)])


def check_world(config: Config, world: int) -> Layout:
    """The layout on `world` ranks; ConfigError if the degrees or the batch do not fit that number."""
    try:
        layout = Layout.of(config.parallel, world)
    except LayoutError as error:
        found = f"degrees that do not fit ({error})"
        fix = f"change the degrees, or start another number of ranks than {world}"
        raise ConfigError([Mistake("", "parallel", found, f"degrees for {world} ranks", fix)]) from None
    if found_wrong := [*_share(config, layout)]:
        raise ConfigError(found_wrong)
    return layout


def stages_per_rank(config: Config) -> int:
    """Model parts a rank holds, the default filled in."""
    parallel = config.parallel
    if parallel.stages_per_rank is not None:
        return parallel.stages_per_rank
    return 1 if parallel.pipeline == 1 else stages.stages_per_rank(None, parallel.schedule)


def _pipeline(config: Config) -> Iterator[Mistake]:
    parallel, layers = config.parallel, config.model.layers
    each = stages_per_rank(config)
    count = parallel.pipeline * each
    if parallel.pipeline == 1:
        if each > 1:
            fix = "leave it out, or raise parallel.pipeline"
            yield _mistake("parallel.stages_per_rank", each, "1 where parallel.pipeline is 1", fix)
        return
    if count > layers:
        name = "parallel.pipeline" if parallel.pipeline > layers else "parallel.stages_per_rank"
        found = parallel.pipeline if parallel.pipeline > layers else each
        expected = f"at most {layers} stages, one for each of model.layers"
        fix = f"{parallel.pipeline} pipeline x {each} stages_per_rank = {count}; lower one"
        yield _mistake(name, found, expected, fix)
    looping = parallel.schedule is not PipelineSchedule.ONE_F_ONE_B
    if parallel.schedule is PipelineSchedule.INTERLEAVED and each < 2:
        expected = f"2 or more for the schedule {parallel.schedule}"
        yield _mistake("parallel.stages_per_rank", each, expected, "raise it, or choose the schedule 1f1b")
    if not looping and each > 1:
        fix = "leave it out, or choose the schedule interleaved or zero_bubble"
        yield _mistake("parallel.stages_per_rank", each, "1 for the schedule 1f1b", fix)
    if parallel.schedule is PipelineSchedule.ZERO_BUBBLE and parallel.recompute is Recompute.BLOCK:
        expected = "none with the schedule zero_bubble, whose backward pass runs in two halves"
        yield _mistake(
            "parallel.recompute", "block", expected, "choose the schedule interleaved, or none here"
        )
    if parallel.schedule is PipelineSchedule.ZERO_BUBBLE and parallel.compile:
        expected = "false with the schedule zero_bubble, whose backward pass runs in two halves"
        yield _mistake("parallel.compile", "true", expected, "choose the schedule interleaved, or false here")
    if config.balance.mode == "auto" and looping and not stages.is_v(each, parallel.schedule):
        expected = (
            f"static with the schedule {parallel.schedule}, which takes only some numbers of micro-batches"
        )
        fix = "set it to static, or parallel.schedule to 1f1b"
        yield _mistake("balance.mode", "auto", expected, fix)
    if config.model.tied_embeddings:
        expected = (
            f"false where parallel.pipeline is {parallel.pipeline}: first and last stage cannot share it"
        )
        yield _mistake(
            "model.tied_embeddings", "true", expected, "set it to false, or parallel.pipeline to 1"
        )


def _experts(config: Config) -> Iterator[Mistake]:
    parallel, moe = config.parallel, config.model.moe
    if parallel.expert == 1:
        return
    if moe is None:
        fix = "set it to 1, or add model.moe"
        yield _mistake("parallel.expert", parallel.expert, "1 for a model without experts", fix)
    elif moe.experts % parallel.expert:
        left = moe.experts % parallel.expert
        sum_ = f"{moe.experts} = {moe.experts // parallel.expert} x {parallel.expert} + {left}"
        fits = ", ".join(str(d) for d in range(1, moe.experts + 1) if moe.experts % d == 0)
        expected = f"a divisor of {moe.experts} (model.moe.experts)"
        yield _mistake("parallel.expert", parallel.expert, expected, f"{sum_}; one of {fits}")
    if parallel.shard != "rest" and parallel.shard % parallel.expert:
        expected = f"a divisor of {parallel.shard} (parallel.shard)"
        fix = f"{parallel.shard} / {parallel.expert} is not whole; make shard a multiple of expert"
        yield _mistake("parallel.expert", parallel.expert, expected, fix)


def _batch(config: Config) -> Iterator[Mistake]:
    batch = config.batch
    if batch.samples % batch.micro:
        below = batch.samples // batch.micro * batch.micro
        near = f"give {below or batch.micro} or {below + batch.micro}"
        fix = f"{batch.samples} / {batch.micro} is not whole; {near}"
        yield _mistake("batch.samples", batch.samples, f"a multiple of {batch.micro} (batch.micro)", fix)
    if config.data.seq_len > config.model.max_positions:
        expected = f"at most {config.model.max_positions} (model.max_positions)"
        yield _mistake(
            "data.seq_len", config.data.seq_len, expected, "lower it, or raise model.max_positions"
        )


def _data(config: Config) -> Iterator[Mistake]:
    data, vocabulary = config.data, config.model.vocab_size
    if data.packing == "best_fit" and data.pad >= vocabulary:
        fix = "give a token id that the model has"
        yield _mistake("data.pad", data.pad, f"less than {vocabulary} (model.vocab_size)", fix)
    held_out = data.evaluation.sources if data.evaluation else []
    for name, sources in (("data.sources", data.sources), ("data.evaluation.sources", held_out)):
        for index, source in enumerate(sources):
            begin, end = source.documents
            if begin >= end:
                expected = "a beginning before its end"
                yield _mistake(f"{name}.{index}.documents", [begin, end], expected, "for example [0, 0.99]")
    for index, source in enumerate(held_out):
        if shared := _overlap(source, data.sources):
            name = f"data.evaluation.sources.{index}.documents"
            begin, end = source.documents
            trained = f"{shared[0]:g} to {shared[1]:g} of {source.prefix}"
            expected = f"documents that data.sources ({trained}) does not train on"
            yield _mistake(
                name, f"{begin:g} to {end:g}", expected, "divide the file between the two, e.g. at 0.99"
            )


def _overlap(source: Source, trained: Sequence[Source]) -> tuple[float, float] | None:
    for other in trained:
        same = Path(other.prefix) == Path(source.prefix)
        if same and max(source.documents[0], other.documents[0]) < min(
            source.documents[1], other.documents[1]
        ):
            return other.documents
    return None


def _optimizer(config: Config) -> Iterator[Mistake]:
    steps, optimizer = config.run.steps, config.optimizer
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps or 0
    if warmup > steps:
        expected = f"at most {steps} (run.steps)"
        yield _mistake("optimizer.warmup_steps", warmup, expected, "lower it, or raise run.steps")
    elif warmup + decay > steps:
        expected = f"at most {steps - warmup}"
        fix = f"warmup_steps {warmup} + decay_steps {decay} = {warmup + decay}, more than run.steps {steps}"
        yield _mistake("optimizer.decay_steps", decay, expected, fix)
    spikes = config.guard.spikes
    if spikes.enabled and spikes.warmup > spikes.window:
        expected = f"at most {spikes.window} (guard.spikes.window)"
        yield _mistake("guard.spikes.warmup", spikes.warmup, expected, "lower it, or widen the window")


def _checkpoints(config: Config) -> Iterator[Mistake]:
    saved = config.checkpoint
    if saved.every_steps and saved.keep_every and saved.keep_every % saved.every_steps:
        expected = f"a multiple of {saved.every_steps} (checkpoint.every_steps)"
        fix = f"no checkpoint is made at step {saved.keep_every}; give {saved.every_steps * 10}"
        yield _mistake("checkpoint.keep_every", saved.keep_every, expected, fix)
    if saved.every_steps is not None or saved.every_minutes is not None:
        return
    for name in ("finite", "spikes", "collapse", "corruption"):
        guard = getattr(config.guard, name)
        if guard.enabled and guard.answer is Answer.ROLL_BACK:
            expected = "another answer where no checkpoints are made on the way"
            yield _mistake(f"guard.{name}.answer", "roll_back", expected, "set checkpoint.every_steps")


def _kernels(config: Config) -> Iterator[Mistake]:
    if config.run.deterministic and config.precision.attention_kernel is AttentionKernel.CUDNN:
        expected = "another kernel where run.deterministic is true: cuDNN's does not repeat bit for bit"
        fix = "choose auto or flash, or set run.deterministic to false"
        yield _mistake("precision.attention_kernel", "cudnn", expected, fix)


def _share(config: Config, layout: Layout) -> Iterator[Mistake]:
    """Whether the batch can be divided among the ranks that read data."""
    samples, micro, ranks = config.batch.samples, config.batch.micro, layout.data_ranks
    if config.balance.mode == "auto":
        unit = micro * layout.expert
        name = f"{micro} (batch.micro) x {layout.expert} (parallel.expert)"
        if samples % unit or samples < micro * ranks:
            least = max(unit, -(-micro * ranks // unit) * unit)
            expected = (
                f"a multiple of {unit} = {name}, and at least {micro * ranks} = {micro} x {ranks} data ranks"
            )
            yield _mistake("batch.samples", samples, expected, f"give {max(least, samples // unit * unit)}")
            return
    elif samples % (micro * ranks):
        unit = micro * ranks
        near = max(1, round(samples / unit)) * unit
        expected = f"a multiple of {unit} = {micro} (batch.micro) x {ranks} data ranks"
        fix = f"{samples} / {unit} is not whole; give {near}, or change the number of ranks or batch.micro"
        yield _mistake("batch.samples", samples, expected, fix)
        return
    if layout.pipeline > 1:
        passes = samples // (micro * ranks)
        try:
            stages.check(passes, layout.pipeline, config.parallel.schedule, stages_per_rank(config))
        except stages.StagesError as error:
            found = f"{samples}, which is {passes} micro-batches a data rank"
            expected = f"what the schedule {config.parallel.schedule} can run"
            yield _mistake("batch.samples", found, expected, str(error))


def _mistake(field: str, found: object, expected: str, fix: str) -> Mistake:
    return Mistake("", field, str(found), expected, fix)
