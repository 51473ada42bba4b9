from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="the train extra's tests need transformers")

from ltf.__main__ import main  # noqa: E402
from ltf.checkpoint.saver import Saver  # noqa: E402
from ltf.checkpoint.state import State  # noqa: E402
from ltf.checkpoint.store import Store  # noqa: E402
from ltf.config.read import read  # noqa: E402
from ltf.config.schema import Checkpoint, Config  # noqa: E402
from ltf.data.errors import DataError  # noqa: E402
from ltf.data.tokenizer import ByteTokenizer, load  # noqa: E402
from ltf.export import export  # noqa: E402
from ltf.model.args import ModelArgs, MoEArgs  # noqa: E402
from ltf.model.decoder import Decoder  # noqa: E402
from ltf.model.hf_config import HfError  # noqa: E402
from ltf.model.init import init_weights  # noqa: E402

TEXT = "the quick brown fox jumps over the lazy dog; "
TEXTS = (
    "hello world",
    " two  spaces\n\tand a tab\r\n",
    "äöü € 😀 中文",
    "\x00\x7f",
    "the names <|endoftext|> and <|pad|> are text here",
    "",
)


def small(**changes: object) -> Config:
    config = read("tiny", ["model.layers=2", "model.width=64", "run.steps=100"])
    return config.model_copy(update={"model": replace(config.model, **changes)})  # type: ignore[arg-type]


def made(args: ModelArgs) -> Decoder:
    model = Decoder(args)
    init_weights(model, 0)
    return model


def trained(config: Config) -> Decoder:
    """Knows one sentence by heart."""
    model = made(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.from_numpy(ByteTokenizer().encode([TEXT * 4])[0].astype("int64")).unsqueeze(0)
    for _ in range(100):
        loss = F.cross_entropy(model(tokens[:, :-1]).out.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model


def saved(config: Config, model: Decoder, folder: Path, step: int = 40) -> Path:
    """The folder of the run's checkpoints, with one."""
    plain = json.loads(config.model_dump_json())
    with Saver(Store(folder), State([model]), Checkpoint(), config=plain, signals=False) as saver:
        saver.finished_update(step, {"step": step})
        saver.request()
    return folder


def test_a_checkpoint_becomes_a_folder_that_transformers_generates_text_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small()
    checkpoints = saved(config, trained(config), tmp_path / "run" / "checkpoints")
    output = tmp_path / "exported"
    assert main(["export", str(checkpoints / "step-00000040"), str(output)]) == 0
    assert "step 40, 1 weight file" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert model.dtype == torch.bfloat16
    written = model.generate(
        **tokenizer(TEXT * 2, return_tensors="pt"), max_new_tokens=len(TEXT), do_sample=False
    )
    assert tokenizer.decode(written[0]) == TEXT * 3


def test_the_folder_of_a_run_gives_its_newest_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small()
    model = made(config.model)
    for step in (10, 20):
        saved(config, model, tmp_path / "run" / "checkpoints", step)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert "step 20," in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokens = torch.randint(0, 258, (2, 16))
    assert torch.allclose(theirs(tokens).logits, model(tokens).out, atol=1e-4)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small()
    folder = saved(config, made(config.model), tmp_path) / "step-00000040"
    file = max(folder.glob("*.distcp"), key=lambda one: one.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert f"error: {folder}: {file.name}: SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_in_place_of_a_damaged_checkpoint_the_newest_good_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small()
    model = made(config.model)
    for step in (10, 20):
        saved(config, model, tmp_path, step)
    file = tmp_path / "step-00000020" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert f"export another checkpoint: {tmp_path / 'step-00000010'} is good" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("none", "step-00000001"):
        assert main(["export", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert "is no checkpoint and holds no good one" in capsys.readouterr().err


def test_byte_ids_are_those_of_training_and_come_back_as_text(tmp_path: Path) -> None:
    args = small().model
    export(made(args).state_dict(), args, tmp_path / "out", tokenizer="bytes")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), ByteTokenizer()
    for text in (*TEXTS, bytes(range(128)).decode(), "".join(map(chr, range(128, 2048)))):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode([text])[0].tolist(), text
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.end_of_document, ours.padding)
    assert len(theirs) == ours.vocabulary
    assert theirs.decode([104, 105, 256], skip_special_tokens=True) == "hi"


def test_generation_ends_with_the_document_and_never_gives_ids_that_mean_nothing(tmp_path: Path) -> None:
    args = small().model
    export(made(args).state_dict(), args, tmp_path / "out", tokenizer="bytes")
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.pad_token_id) == (256, 257)
    assert settings.suppress_tokens == list(range(258, args.vocab_size))


def test_a_tokenizer_file_goes_with_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    args = small(vocab_size=4096).model
    export(made(args).state_dict(), args, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load(str(tmp_path / "tokenizer.json"))
    assert theirs("a b b")["input_ids"] == ours.encode(["a b b"])[0].tolist()
    assert theirs.eos_token_id == ours.end_of_document == 3


def test_a_model_of_words_gets_no_tokenizer_unless_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(vocab_size=4096)
    folder = saved(config, made(config.model), tmp_path / "run")
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert "name the data's with --tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 4096


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    args = small(vocab_size=257).model
    with pytest.raises(DataError, match="has 258 tokens, the model 257"):
        export(made(args).state_dict(), args, tmp_path / "out", tokenizer="bytes")
    assert list(tmp_path.iterdir()) == []


def test_what_qwen3_cannot_express_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(moe=MoEArgs(experts=4, top_k=2, expert_width=16, shared_experts=1))
    folder = saved(config, made(config.model), tmp_path / "run")
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: model.moe.shared_experts is 1; Qwen3 has only")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    args = small().model
    (tmp_path / "out").mkdir()
    with pytest.raises(HfError, match="exists: name a new folder"):
        export(made(args).state_dict(), args, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
