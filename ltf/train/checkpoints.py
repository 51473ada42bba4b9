"""When a run saves, what it goes on from, and what it tells of both."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from ltf import events
from ltf.checkpoint.load import Loaded, LoadError, load
from ltf.checkpoint.saver import Saved, Saver
from ltf.checkpoint.state import State
from ltf.checkpoint.store import Store
from ltf.config.schema import Config
from ltf.events import CheckpointReason, ResumeReason
from ltf.lines import size
from ltf.parallel.world import World
from ltf.train.assembly import Model
from ltf.train.changed import changes
from ltf.train.progress import Progress
from ltf.train.report import Report

REASONS = {
    "schedule": CheckpointReason.INTERVAL,
    "time": CheckpointReason.TIME,
    "retry": CheckpointReason.INTERVAL,
}


def folder_of(config: Config) -> Path:
    """Where a run's checkpoints are."""
    return config.checkpoint.directory or config.run.output / "checkpoints"


class Checkpoints:
    """All ranks call it alike. `resume` comes first; the context then is the time in which saves are made."""

    def __init__(self, config: Config, world: World, model: Model, report: Report) -> None:
        self._config, self._world, self._report = config, world, report
        self._settings = config.checkpoint
        self._store = Store(folder_of(config))
        self._state = State(model.parts, [model.optimizer], model.loads.tensors())
        self._saver: Saver | None = None
        self._last: int | None = None
        self._where: str | None = None
        self._stall = 0.0

    @property
    def saver(self) -> Saver:
        assert self._saver is not None  # used inside the context only
        return self._saver

    @property
    def stopping(self) -> bool:
        """Whether the run was told to end and its state is copied."""
        return self._saver is not None and self._saver.stopping

    @property
    def any_good(self) -> bool:
        """Whether there is a checkpoint to return to."""
        return self._last is not None

    def where_it_is(self) -> str:
        """The end of a sentence about the newest good checkpoint, and how to use what is in it."""
        if self._where is None:
            return ", and no checkpoint"
        export = f"`python -m ltf export {self._where} FOLDER` makes a model to use of it"
        return f", saved in {self._where}; {export}"

    def resume(self) -> Progress:
        """Take up the newest good checkpoint; that of a new run if there is none. LoadError if none fits."""
        return self._load(events.ResumeReason.RESTART) or Progress()

    def roll_back(self, failed: Progress) -> Progress:
        """Back to the newest good checkpoint, between `before_update` and `finished_update`.

        The samples that `failed` was reading are passed over. What is being written is waited for first.
        """
        self.saver.wait()
        self.poll()
        loaded = self._load(ResumeReason.ROLL_BACK)
        # Decided only where there is one; all of them bad by now is not something to train on from.
        if loaded is None:
            raise RuntimeError("the checkpoint to return to is no longer good, and there is no other")
        return loaded.rolled_back_from(failed, self._config.batch.samples)

    def before_update(self) -> float:
        waited = self.saver.before_update()
        self._stall += waited
        return waited

    def finished_update(self, progress: Progress) -> float:
        """Tell the state; save it if that is due. Seconds that training stood still."""
        self.saver.finished_update(progress.step, progress.to_json())
        settings, step = self._settings, progress.step
        last = step == self._config.run.steps
        interval = settings.every_steps is not None and step % settings.every_steps == 0
        if step in (0, self._last) or not (interval or (last and settings.at_end)):
            return 0.0
        self._report.event(
            events.CheckpointStarted(
                step=step,
                path=str(self._store.path_of(step)),
                reason=CheckpointReason.INTERVAL if interval else CheckpointReason.END,
                background=settings.background,
            )
        )
        self._stall = self.saver.request()
        return self._stall

    def poll(self) -> None:
        """Tell what became of saves since the last call."""
        for happened in self.saver.poll():
            if isinstance(happened, Saved):
                self._last, self._where = happened.version, str(happened.path)
                self._report.say(
                    f"saved {happened.path}, {size(happened.size)} in {happened.seconds:.1f} s, of which "
                    f"training stood still {self._stall:.2f} s"
                )
                self._report.event(
                    events.CheckpointSaved(
                        step=happened.version,
                        path=str(happened.path),
                        bytes=happened.size,
                        seconds=happened.seconds,
                        stall_seconds=self._stall,
                    )
                )
            else:
                self._report.finding(happened)

    def finish(self) -> None:
        """Wait until all that was asked for is durable, or has failed."""
        self.saver.wait()
        self.poll()

    def _load(self, reason: ResumeReason) -> Progress | None:
        began = time.perf_counter()
        found = load(
            self._store,
            self._state,
            seed=self._config.run.seed,
            device=self._world.device,
            abandon_newer=reason is ResumeReason.ROLL_BACK,
        )
        self._report.findings(found.findings)
        if not isinstance(found, Loaded):
            return None
        self._last, self._where = found.version, str(found.entry.path)
        seconds = time.perf_counter() - began
        path = str(found.entry.path)
        self._report.event(events.CheckpointVerified(found.version, path, found.manifest.size, seconds))
        self._report.event(events.Resumed(found.version, path, reason, seconds))
        self._report.say(f"going on from {path}, step {found.version}, verified and read in {seconds:.1f} s")
        if reason is ResumeReason.RESTART:
            present = self._config.model_dump(mode="json")
            self._report.findings(changes(found.manifest.config, present, found.version))
        try:
            return Progress.from_json(found.progress)
        except ValueError as error:
            raise LoadError(f"{path}: {error}; use the version that saved it, or another folder") from None

    def __enter__(self) -> Self:
        self._saver = Saver(
            self._store,
            self._state,
            self._settings,
            config=self._config.model_dump(mode="json"),
            device=self._world.device,
            saved=self._last,
            on_exit=self._report.killed,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.saver.__exit__(kind, error, trace)
        self.poll()
