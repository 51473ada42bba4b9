"""The same work must give the same bits: over repeats, on every device, on every core, when hot.

Three questions with answers of falling certainty: arithmetic whose answer is known for all machines
(integers, correctly rounded floats); repeats on one device; devices of one node, where the majority names
the odd one. The digest itself is reported with the software stack, so that nodes with equal stacks can be
compared.
"""

import collections
import contextlib
import ctypes
import hashlib
import os
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from probes.agent.api import Host, Measure, Measures
from probes.checks import cpu_loops
from probes.checks.torch_devices import Device, Under, find, label, on_devices, unmeasured

INTEGER_ANSWER = "380c75b291d0712716a97be2e7ebcc99d60e033e3270602191a215b819c78a21"
"""Digest of integer_work on every sound device."""
INTEGER_CELLS = 1 << 16


def golden(host: Host, under: Under = contextlib.nullcontext) -> Measures:
    """Counts of answers that differ from the known, the repeated, or the other devices' answer.

    params: ``repeats``; ``warm_seconds`` of products between them; ``size`` of the matrices (part of the
    digest).
    """
    repeats = int(host.params.get("repeats", 5))
    wrong = cpu_loops.wrong_cpus(sorted(os.sched_getaffinity(0)), rounds=max(5, repeats))
    if wrong:
        host.note("wrong arithmetic on CPU " + ", ".join(map(str, wrong)))
    measures = [Measure("wrong_cpus", len(wrong))]
    found = find(host)
    if found.torch is None:
        host.note(found.lacking + "; only arithmetic with a known answer was compared")
        return measures + unmeasured(host, found._replace(lacking=""))
    size = int(host.params.get("size", 1024) if found.devices else host.params.get("cpu_size", 256))
    warm = float(host.params.get("warm_seconds", 0.5))

    def work(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        # cuBLAS splits its sums as its workspace allows, CPU libraries by their threads: both are kept fixed.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        device.torch.set_num_threads(1)
        digests, integers = [], []
        for repeat in range(repeats):
            say("repeat %d" % (repeat + 1))
            integers.append(integer_work(device.torch, device.at))
            digests.append(float_work(device.torch, device.at, size))
            _heat(device, 4096 if found.devices else size, warm / repeats)
        return {"digests": digests, "integers": integers}

    states, results = on_devices(host, found, work, float(host.params.get("limit", 60.0)), under)
    measures += states
    digests = {name: answer["digests"] for name, answer in results.items()}
    for name, answer in results.items():
        bad = sum(integer != INTEGER_ANSWER for integer in answer["integers"])
        measures.append(Measure("wrong_integers", bad, label(name)))
    judged, agreed = compare(digests)
    measures += judged
    for name, answer in digests.items():
        if len(set(answer)) > 1:
            host.note("device %s gave %s" % (name, ", ".join(d[:12] for d in answer)))
    if agreed is not None:
        measures += [Measure("digest", agreed[:32]), Measure("stack", "%s, n=%d" % (found.stack, size))]
    return measures


def compare(digests: Mapping[str, Sequence[str]]) -> Tuple[List[Measure], Optional[str]]:
    """Judge each device's repeats, then the devices; and the digest on which the node agrees, if it does.

    A device's own answer is its most frequent one. With no strict majority of devices nobody is named:
    the disagreement is the node's.
    """
    measures = []
    own = {}
    for name, answers in digests.items():
        (usual, times), *_ = collections.Counter(answers).most_common()
        own[name] = usual
        measures.append(Measure("differing_repeats", len(answers) - times, label(name)))
    if not own:
        return measures, None
    (agreed, votes), *_ = collections.Counter(own.values()).most_common()
    majority = 2 * votes > len(own)
    if len(own) > 1:
        measures += [Measure("odd", int(majority and own[name] != agreed), name) for name in own]
        measures.append(Measure("devices_disagree", int(not majority)))
    return measures, agreed if majority else None


def integer_work(torch: Any, at: Any) -> str:
    """Digest of wrapping 32-bit arithmetic over many cells: exact, so one answer for all devices."""
    x = torch.arange(INTEGER_CELLS, dtype=torch.int32).to(at)
    for factor in (1664525, 22695477, 1103515245):
        x = x * factor + 1013904223
        x = x ^ ((x >> 13) & 0x7FFFF)
        x = x + torch.flip(x, (0,))
    return digest([x])


def float_work(torch: Any, at: Any, n: int) -> str:
    """Digest of a chain of products, layer norms, an activation and an attention, in float32 and bfloat16."""
    generator = torch.Generator().manual_seed(7)
    if hasattr(torch.backends, "cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False
    functional = torch.nn.functional
    outputs = []
    # Integers over a power of two: the inputs have the same bits whatever machine made them.
    cells = [
        torch.randint(-1024, 1025, (n, n), generator=generator).to(torch.float32) / 1024 for _ in range(4)
    ]
    for dtype in (torch.float32, torch.bfloat16):
        x, *weights = [cell.to(dtype).to(at) for cell in cells]
        for weight in weights:
            # Kept themselves: what follows may round a low bit away.
            outputs.append(x @ weight)
            x = functional.layer_norm(functional.gelu(outputs[-1] * n**-0.5) + x, (n,))
        heads = x.reshape(n, n // 64, 64).transpose(0, 1)
        scores = torch.softmax(heads @ heads.transpose(1, 2) * 0.125, dim=-1)
        outputs += [x, scores @ heads]
    return digest(outputs)


def digest(tensors: Sequence[Any]) -> str:
    """SHA-256 over the bytes of the tensors, or "not finite"."""
    total = hashlib.sha256()
    for tensor in tensors:
        here = tensor.detach().cpu().contiguous()
        if here.is_floating_point() and not bool(here.isfinite().all()):
            return "not finite"
        total.update(ctypes.string_at(here.data_ptr(), here.numel() * here.element_size()))
    return total.hexdigest()


def _heat(device: Device, n: int, seconds: float) -> None:
    a = device.torch.ones((n, n), device=device.at)
    spent = 0.0
    while spent < seconds:
        spent += device.seconds(lambda: a @ a, 10)
