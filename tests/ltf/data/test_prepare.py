"""Text into token files: whole or not at all, the same for any number of processes, broken lines named."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ltf.data.command import main
from ltf.data.corpus import NUMBERS, documents
from ltf.data.errors import DataError
from ltf.data.inputs import Documents
from ltf.data.megatron import TokenFile
from ltf.data.prepare import Progress, Recipe, held_out_prefix, prepare
from ltf.data.tokenizer import ByteTokenizer, FileTokenizer

TEXTS = ["First.", "Zweites: größer, 日本語.", "third\nwith lines\r\nof both kinds"]


def json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)))
    return path


def texts_of(prefix: str | Path) -> list[str]:
    """What a byte-level corpus says, each document without its end."""
    file = TokenFile(prefix)
    file.validate(258)
    found = []
    for number in range(file.documents):
        tokens = file.document(number).tolist()
        assert tokens[-1] == 256
        found.append(ByteTokenizer().decode(tokens))
    return found


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines_become_documents_whatever_packs_them(tmp_path: Path, ending: str) -> None:
    plain = json_lines(tmp_path / "in.jsonl", TEXTS).read_bytes()
    # Two members and two frames: what `cat a.gz b.gz` and `zstd --long` archives hold.
    half = plain.index(b"\n") + 5
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    source = tmp_path / f"packed.jsonl{ending}"
    source.write_bytes(pack(plain[:half]) + pack(plain[half:]))
    made = prepare([source], tmp_path / "out")
    assert texts_of(tmp_path / "out") == TEXTS
    assert (made.train.documents, made.train.vocabulary) == (3, 258)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Documents.FILE, ["one\ntwo\n\n\nthree\n"]),
        (Documents.PARAGRAPH, ["one\ntwo\n", "three\n"]),
        (Documents.LINE, ["one\n", "two\n", "three\n"]),
    ],
)
def test_a_text_file_holds_the_documents_that_the_recipe_says(
    tmp_path: Path, kind: Documents, expected: list[str]
) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n\n\nthree\n")
    prepare([tmp_path / "in.txt"], tmp_path / "out", Recipe(documents=kind))
    assert texts_of(tmp_path / "out") == expected


def test_a_folder_gives_its_files_by_name_and_leaves_others_alone(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    json_lines(folder / "b.jsonl", ["from b"])
    (folder / "a.txt").write_text("from a")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    prepare([folder], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["from a", "from b"]


def corpus(tmp_path: Path, size: int = 3000) -> tuple[Path, list[str]]:
    made = documents(1)
    texts = [next(made) for _ in range(size)]
    return json_lines(tmp_path / "in.jsonl", texts), texts


def test_the_output_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    source, _ = corpus(tmp_path)
    for processes in (1, 3):
        prepare([source], tmp_path / f"out{processes}", Recipe(held_out=0.1), processes=processes)
    for part in ("", "-held-out"):
        for suffix in ("bin", "idx"):
            one, three = (tmp_path / f"out{n}{part}.{suffix}" for n in (1, 3))
            assert one.read_bytes() == three.read_bytes()


def test_a_document_is_held_out_by_its_text_alone(tmp_path: Path) -> None:
    source, texts = corpus(tmp_path)
    prepare([source], tmp_path / "out", Recipe(held_out=0.1))
    train, held = texts_of(tmp_path / "out"), texts_of(held_out_prefix(tmp_path / "out"))
    assert sorted(train + held) == sorted(texts)
    assert not set(train) & set(held)
    # Binomial(3000, 0.1): five standard deviations.
    assert abs(len(held) - 300) < 83
    again = json_lines(tmp_path / "again.jsonl", ["new"] * 5 + texts[:1000:-1])
    prepare([again], tmp_path / "other", Recipe(held_out=0.1))
    assert set(texts_of(held_out_prefix(tmp_path / "other"))) - {"new"} == set(held) & set(texts[1001:])


BROKEN = {
    b'{"text": "cut': "not JSON: Unterminated string",
    b'["text"]': "expected a JSON object, found list",
    b'{"body": "x"}': "no field 'text'; it has 'body'",
    b'{"text": 5}': "field 'text' is int, expected text",
    b'{"text": "\xff"}': "not UTF-8: byte 0xff",
    b'{"text": "\\ud800"}': "half a surrogate pair",
}


@pytest.mark.parametrize("line", BROKEN)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_broken_line_is_named_and_nothing_is_written(tmp_path: Path, line: bytes, processes: int) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "last"}')
    with pytest.raises(DataError) as told:
        prepare([source], tmp_path / "out", processes=processes)
    assert str(told.value).startswith(f"{source}:3: ")
    assert BROKEN[line] in str(told.value)
    assert "--skip-broken" in str(told.value)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_broken_lines_are_skipped_and_counted_when_asked(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n' + b"\n".join(BROKEN) + b'\n{"text": "last"}\n{"text": " "}')
    made = prepare([source], tmp_path / "out", Recipe(skip_broken=True))
    assert texts_of(tmp_path / "out") == ["good", "last"]
    assert (made.total.broken, made.total.empty, made.train.skipped) == (len(BROKEN), 1, len(BROKEN))
    assert [broken.line for broken in made.examples] == list(range(2, 2 + len(BROKEN)))


def test_a_line_that_is_not_utf8_is_named_within_its_document(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"fine\nalso fine\nbad \xfe here\n")
    with pytest.raises(DataError, match=r"in\.txt:3: not UTF-8: byte 0xfe"):
        prepare([tmp_path / "in.txt"], tmp_path / "out")


def test_a_line_longer_than_allowed_is_named_without_being_held(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "in.jsonl", ["short", "x" * 5_000_000, "end"])
    with pytest.raises(DataError, match=r"in\.jsonl:2: 5000\d+ bytes, longer than 1000"):
        prepare([source], tmp_path / "out", Recipe(longest=1000))
    prepare([source], tmp_path / "out", Recipe(longest=1000, skip_broken=True))
    assert texts_of(tmp_path / "out") == ["short", "end"]
    (tmp_path / "in.txt").write_text("line\n" * 500)
    with pytest.raises(DataError, match="the document that begins at line 1 is longer than 1000 bytes"):
        prepare([tmp_path / "in.txt"], tmp_path / "out2", Recipe(longest=1000))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_or_damaged_archive_is_refused_even_when_broken_lines_are_not(
    tmp_path: Path, ending: str
) -> None:
    plain = json_lines(tmp_path / "in.jsonl", [str(n) * 50 for n in range(2000)]).read_bytes()
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[ending]
    packed = pack(plain)
    source = tmp_path / f"a.jsonl{ending}"
    for damaged in (packed[:-1], packed[: len(packed) // 2], b"no archive at all"):
        source.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.jsonl{ending}: byte \d+: (damaged|truncated)"):
            prepare([source], tmp_path / "out", Recipe(skip_broken=True))
    middle = bytearray(packed)
    middle[len(packed) // 2] ^= 0x40
    source.write_bytes(middle)
    with pytest.raises(DataError, match=r"damaged|truncated"):
        prepare([source], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, "in.jsonl"])


def test_progress_ends_at_all_that_there_was(tmp_path: Path) -> None:
    source, texts = corpus(tmp_path)
    seen: list[Progress] = []
    made = prepare([source], tmp_path / "out", progress=seen.append)
    assert len(seen) > 1
    assert [p.documents for p in seen] == sorted(p.documents for p in seen)
    assert (seen[-1], seen[-1].documents) == (made.total, len(texts))
    assert seen[-1].read == seen[-1].size == source.stat().st_size


def test_an_existing_output_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    old, new = json_lines(tmp_path / "old.jsonl", ["old"]), json_lines(tmp_path / "new.jsonl", ["new"])
    prepare([old], tmp_path / "out")
    with pytest.raises(DataError, match=r"out\.idx: exists already: .* --overwrite"):
        prepare([new], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["old"]
    prepare([new], tmp_path / "out", Recipe(overwrite=True))
    assert texts_of(tmp_path / "out") == ["new"]


def test_an_earlier_held_out_part_is_not_left_beside_a_corpus_that_holds_its_documents(
    tmp_path: Path,
) -> None:
    source, _ = corpus(tmp_path, 100)
    prepare([source], tmp_path / "out", Recipe(held_out=0.2))
    with pytest.raises(DataError, match=r"out-held-out\.idx: lies here from an earlier run"):
        prepare([source], tmp_path / "out", Recipe(overwrite=True))
    made = prepare([source], tmp_path / "out", Recipe(held_out=0.5, overwrite=True))
    assert made.held_out is not None
    assert (made.train.side, made.held_out.side) == ("train", "held-out")
    assert made.train.documents + made.held_out.documents == 100


def test_a_run_killed_in_the_middle_leaves_no_output(tmp_path: Path) -> None:
    source, _ = corpus(tmp_path, 400)
    code = (
        "import os, signal, sys\n"
        "from ltf.data.prepare import prepare\n"
        "prepare([sys.argv[1]], sys.argv[2], progress=lambda now: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "out")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("out*"))
    prepare([source], tmp_path / "out")
    assert len(texts_of(tmp_path / "out")) == 400


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    """A byte-pair encoding trained on the grammar's text."""
    made = documents(5)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<stop>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([next(made) for _ in range(200)], trainer)
    # A file made for inference: this would cut every document.
    tokenizer.enable_truncation(8)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_a_tokenizer_file_gives_documents_that_decode_to_their_text(
    tmp_path: Path, tokenizer_json: Path, processes: int
) -> None:
    source, texts = corpus(tmp_path, 100)
    made = prepare([source], tmp_path / "out", Recipe(tokenizer=str(tokenizer_json)), processes=processes)
    file, tokenizer = TokenFile(tmp_path / "out"), FileTokenizer(tokenizer_json)
    file.validate(600)
    found = [file.document(number).tolist() for number in range(file.documents)]
    assert {document[-1] for document in found} == {tokenizer.end_of_document} == {0}
    assert [tokenizer.decode(document[:-1]) for document in found] == texts
    assert made.train.tokens < sum(map(len, texts)) / 2
    assert made.train.tokenizer == tokenizer.identity


def test_the_end_of_documents_is_named_or_known(tmp_path: Path, tokenizer_json: Path) -> None:
    assert FileTokenizer(tokenizer_json, "<stop>").end_of_document == 1
    with pytest.raises(DataError, match=r"has no token <end> to end documents with: .* --eod"):
        FileTokenizer(tokenizer_json, "<end>")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a tokenizer\.json"):
        FileTokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        FileTokenizer(tmp_path / "none.json")


def test_the_command_prepares_checks_and_makes_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "grammar.jsonl", tmp_path / "out"
    assert main(["corpus", str(text), "--bytes", "50000"]) == 0
    assert main(["prepare", str(text), "-o", str(out), "--held-out", "0.2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["schema"] == "ltf/data-prepare/1"
    assert made["train"]["tokens"] + made["held_out"]["tokens"] == made["total"]["tokens"] > 50_000
    assert main(["check", str(out), held_out_prefix(out), "--whole"]) == 0
    assert "checked every token" in capsys.readouterr().out
    tokens = Path(f"{out}.bin")
    content = bytearray(tokens.read_bytes())
    content[1000] ^= 1
    tokens.write_bytes(content)
    assert main(["check", str(out), "--whole"]) == 2
    assert f"{tokens}: SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nowhere.jsonl", "-o", "out"], "nowhere.jsonl: no such file or folder"),
        (["prepare", __file__, "-o", "out"], "unknown kind of file; expected .txt"),
        (["prepare", "x.txt", "-o", "out", "--held-out", "1"], "held-out share 1.0: expected 0 to below 1"),
        (["check", "nowhere"], "nowhere.idx: no such file"),
        (["corpus", "text.txt"], "text.txt: expected a name that ends in .jsonl"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_the_trainers_command_line_knows_data(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ltf", *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)

    assert run("data", "corpus", "text.jsonl", "--bytes", "300000").returncode == 0
    made = run("data", "prepare", "text.jsonl", "-o", "out", "--processes", "2")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith("out: ")
    assert (tmp_path / "out.idx").exists()
    wrong = run("data", "check", "nowhere")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_the_grammar_writes_the_same_text_for_a_seed_and_sums_that_come_out_right() -> None:
    one, other = documents(7), documents(7)
    texts = [next(one) for _ in range(300)]
    assert texts == [next(other) for _ in range(300)]
    assert texts[:3] != [text for text, _ in zip(documents(8), range(3), strict=False)]
    sums = 0
    for text in texts:
        assert 300 < len(text) < 2500
        for sentence in text.split(". "):
            if "together" in sentence:
                words = [NUMBERS.index(word) for word in sentence.replace(":", "").split() if word in NUMBERS]
                assert words[0] + words[1] == words[2]
                sums += 1
    assert sums > 300


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """A corpus of 60 MB that unpacks from a few takes no more memory than one of 6 MB."""
    code = (
        "import resource, sys\n"
        "from ltf.data.prepare import prepare\n"
        "prepare([sys.argv[1]], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    line = json.dumps({"text": "some words that come again and again " * 20}) + "\n"
    peaks = []
    for size in (6, 60):
        source = tmp_path / f"{size}.jsonl.zst"
        with zstandard.open(source, "wt") as file:
            for _ in range(size * 1_000_000 // len(line)):
                file.write(line)
        command = [sys.executable, "-c", code, str(source), str(tmp_path / str(size))]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(run.stdout) * 1024)
    assert peaks[1] - peaks[0] < 20_000_000
