from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="the train extra's tests need transformers")

from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from ltf.model import hf  # noqa: E402
from ltf.model.args import ModelArgs, ScoreFunction, Stage  # noqa: E402
from ltf.model.decoder import Decoder  # noqa: E402
from ltf.model.hf_config import HfError, args_from_config, config_from_args  # noqa: E402
from tests.ltf.model.shapes import COUNTED, DENSE, MOE, decoder, moe, tokens  # noqa: E402

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Qwen3", {}),
    "dense, tied": ("Qwen3", {"tie_word_embeddings": True}),
    "dense, one key head, other angles": (
        "Qwen3",
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "experts, scores renormalised": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}),
    "experts, scores as they are": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": False}),
    "experts after a dense layer, tied": (
        "Qwen3Moe",
        EXPERTS | {"mlp_only_layers": [0], "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "one expert a token": ("Qwen3Moe", EXPERTS | {"num_experts_per_tok": 1}),
}
OURS = {
    "dense": DENSE,
    "dense, tied": replace(DENSE, tied_embeddings=True),
    "experts, scores renormalised": MOE,
    "experts, scores as they are": moe(renormalise=False),
    "experts after a dense layer": COUNTED["experts after a dense layer"],
}


def their_model(name: str) -> Any:
    kind, changes = THEIRS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SMALL | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.normal_(1.0, 0.2)
    return model


def loss(logits: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())


@pytest.mark.parametrize("name", THEIRS)
def test_their_random_model_gives_the_same_logits_here(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours = hf.load(tmp_path)
    x = tokens(ours.args, 2, 40)
    with torch.no_grad():
        expected, found = theirs(x).logits, ours(x).out
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", THEIRS)
def test_gradients_of_the_loss_agree_with_theirs(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours = hf.load(tmp_path)
    x = tokens(ours.args, 2, 40)
    for logits in (theirs(x).logits, ours(x).out):
        torch.autograd.backward(loss(logits, x))
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    compared = 0
    for ours_name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        for their_name, gradient in their_pieces(ours_name, parameter.grad, expected):
            torch.testing.assert_close(
                gradient,
                expected.pop(their_name),
                rtol=1e-3,
                atol=1e-5,
                msg=partial("{}: {}".format, their_name),
            )
            compared += 1
    assert compared > 10
    assert not expected


def their_pieces(name: str, gradient: Tensor, theirs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Our gradient under the names of their parameters in memory, where experts are stacked."""
    pieces = list(hf.split(name, gradient))
    if pieces[0][0] in theirs:
        yield from pieces
        return
    prefix = name.split(".ffn.")[0]
    which = "gate_up_proj" if name.endswith("gate_up") else "down_proj"
    yield f"model.{prefix}.mlp.experts.{which}", gradient


@pytest.mark.parametrize("name", OURS)
def test_our_model_gives_the_same_logits_there(name: str, tmp_path: Path) -> None:
    ours = decoder(OURS[name])
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    hf.export(ours.state_dict(), ours.args, tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = tokens(ours.args, 2, 40)
    with torch.no_grad():
        found, expected = theirs(x).logits, ours(x).out
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_what_is_exported_and_loaded_again_is_bit_identical(name: str, tmp_path: Path) -> None:
    args = replace(OURS[name], max_positions=512)
    ours = decoder(args)
    hf.export(ours.state_dict(), args, tmp_path / "out")
    back = hf.load(tmp_path / "out")
    assert back.args == args
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), back.parameters(), strict=True))


def test_a_large_model_is_written_in_shards_that_transformers_reads(tmp_path: Path) -> None:
    ours = decoder(MOE)
    limit = 40_000
    files = hf.export(ours.state_dict(), MOE, tmp_path / "out", shard_bytes=limit)
    assert len(files) > 3
    assert all(f.stat().st_size < limit + 8000 for f in files)  # the header comes on top
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in ours.parameters())
    back = hf.load(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), back.parameters(), strict=True))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    x = tokens(MOE)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x).out, rtol=0, atol=1e-4)


def test_experts_stacked_in_the_file_are_read_too(tmp_path: Path) -> None:
    theirs = their_model("experts, scores renormalised")
    theirs.save_pretrained(tmp_path)
    state = {n: p.detach().contiguous() for n, p in theirs.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    ours = hf.load(tmp_path)
    x = tokens(ours.args)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).out, theirs(x).logits, rtol=0, atol=1e-4)


def test_weights_are_cast_on_the_way_out_and_in(tmp_path: Path) -> None:
    ours = decoder(DENSE)
    hf.export(ours.state_dict(), DENSE, tmp_path / "out", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    back = hf.load(tmp_path / "out", dtype=torch.float64)
    for p, q in zip(ours.parameters(), back.parameters(), strict=True):
        assert torch.equal(p.bfloat16().double(), q)


def test_a_stage_takes_its_own_part_of_the_files(tmp_path: Path) -> None:
    ours = decoder(MOE)
    hf.export(ours.state_dict(), MOE, tmp_path / "out")
    stage = Decoder(MOE, Stage((1,), embed=False, head=False))
    hf.load_into(stage, tmp_path / "out")
    whole = dict(ours.named_parameters())
    assert all(torch.equal(p, whole[n]) for n, p in stage.named_parameters())


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (replace(DENSE, qk_norm=False), "qk_norm"),
        (moe(shared_experts=1), "moe.shared_experts"),
        (moe(score=ScoreFunction.SIGMOID), "moe.score"),
        (moe(route_scale=2.0), "moe.route_scale"),
        (moe(bias_update_rate=0.1), "moe.bias_update_rate"),
        (moe(top_k=(2, 3, 2)), "moe.top_k"),
    ],
)
def test_what_qwen3_cannot_express_is_not_exported(args: ModelArgs, field: str, tmp_path: Path) -> None:
    with pytest.raises(HfError, match=field):
        hf.export(decoder(args).state_dict(), args, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ],
)
def test_a_config_of_another_kind_of_model_is_refused_by_field(changes: dict[str, Any], told: str) -> None:
    config = config_from_args(MOE, torch.float32)
    args_from_config(config)
    with pytest.raises(HfError, match=told):
        args_from_config(config | changes)


def test_a_config_of_transformers_4_is_read_alike() -> None:
    config = config_from_args(MOE, torch.float32)
    older = {k: v for k, v in config.items() if k != "rope_parameters"} | {"rope_scaling": None}
    assert args_from_config(older) == args_from_config(config)


def test_a_folder_that_is_not_whole_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(HfError, match=r"config\.json"):
        hf.load(tmp_path)
    out = tmp_path / "out"
    files = hf.export(decoder(MOE).state_dict(), MOE, out, shard_bytes=100_000)
    files[1].unlink()
    with pytest.raises(HfError, match=files[1].name):
        hf.load(out)
    (out / hf.INDEX).unlink()
    with pytest.raises(HfError, match="neither"):
        hf.load(out)


def test_weights_and_config_of_two_models_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hf.export(decoder(MOE).state_dict(), MOE, out)
    config = json.loads((out / "config.json").read_text())
    for changes, told in (
        ({"moe_intermediate_size": 16}, "has shape"),
        ({"num_experts": 9}, r"experts\.8|has shape"),
        ({"num_hidden_layers": 2}, "no place"),
        ({"num_hidden_layers": 4}, "lack model.layers.3"),
    ):
        (out / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(HfError, match=told):
            hf.load(out)


def test_a_part_of_a_model_or_an_existing_folder_is_not_exported(tmp_path: Path) -> None:
    state = decoder(MOE).state_dict()
    part = {name: value for name, value in state.items() if ".2." not in name}
    with pytest.raises(HfError, match=r"the state lacks layers\.2"):
        hf.export(part, MOE, tmp_path / "out")
    cut = state | {"lm_head.weight": state["lm_head.weight"][:10]}
    with pytest.raises(HfError, match=r"the shape of lm_head\.weight"):
        hf.export(cut, MOE, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(HfError, match="exists"):
        hf.export(state, MOE, tmp_path / "out")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    (file,) = hf.export(decoder(MOE).state_dict(), MOE, tmp_path / "out")
    whole = file.read_bytes()
    for length in (0, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(HfError, match=r"model\.safetensors is cut short"):
            hf.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {"lm_head.weight": "../model.safetensors"}}, "no weight_map"),
        ({"weight_map": {"model.embed_tokens.weight": "odd.safetensors"}}, "which it does not"),
    ],
)
def test_an_index_that_is_wrong_is_refused(index: dict[str, Any], told: str, tmp_path: Path) -> None:
    (file,) = hf.export(decoder(DENSE).state_dict(), DENSE, tmp_path / "out")
    save_file({"other": torch.ones(1)}, file.with_name("odd.safetensors"))
    (tmp_path / "out" / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(HfError, match=told):
        hf.load(tmp_path / "out")


def test_an_export_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    state = decoder(DENSE).state_dict()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises((SafetensorError, OSError)):
            hf.export(state, DENSE, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []
