"""Ten training steps on the device against the same ten in float64 on the CPU.

Whole-stack arithmetic: products, attention, layer norm, loss, their gradients, AdamW. A kernel that is wrong
in one gradient only, or an error that only accumulates, shows here and in no single operation.
"""

import contextlib
import math
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

from probes.agent.api import Host, Measure, Measures, Unsupported
from probes.checks.torch_devices import Device, Under, find, label, on_devices

VOCABULARY, WIDTH, HEADS, LAYERS, BATCH, LENGTH = 97, 64, 4, 2, 4, 32


def training_step(host: Host, under: Under = contextlib.nullcontext) -> Measures:
    """Lowest cosine of outputs, of gradients, of parameters and of their change, to the float64 reference.

    By tensor, and the worst is reported: a wrong layer norm disappears in the cosine over everything.
    params: ``steps``; ``limit`` in seconds.
    """
    found = find(host)
    if found.torch is None:
        raise Unsupported(found.lacking)
    steps = int(host.params.get("steps", 10))

    def work(device: Device, say: Callable[[str], None]) -> Dict[str, Any]:
        torch = device.torch
        torch.set_num_threads(1)  # operations this small only wait for each other's threads
        say("reference")
        reference = train(torch, torch.device("cpu"), torch.float64, steps)
        say("device")
        trained = train(torch, device.at, torch.float32, steps)
        answer: Dict[str, Any] = {
            "output_cosine": cosine(trained.output, reference.output),
            "gradient_cosine": worst(trained.gradients, reference.gradients),
            "parameter_cosine": worst(trained.parameters, reference.parameters),
            "update_cosine": worst(trained.updates, reference.updates),
            "loss_difference": abs(trained.losses[-1] - reference.losses[-1]),
        }
        answer["notes"] = [
            "loss %.4f to %.4f, reference %.4f to %.4f"
            % (trained.losses[0], trained.losses[-1], reference.losses[0], reference.losses[-1])
        ]
        return answer

    measures, results = on_devices(host, found, work, float(host.params.get("limit", 60.0)), under)
    return measures + [
        Measure(metric, value, label(name))
        for name, answer in results.items()
        for metric, value in answer.items()
    ]


class Trained(NamedTuple):
    output: Any
    gradients: List[Any]
    """Of the first step, by parameter."""
    parameters: List[Any]
    updates: List[Any]
    losses: List[float]


def train(torch: Any, at: Any, dtype: Any, steps: int) -> Trained:
    """`steps` AdamW steps of a small decoder-only transformer from fixed weights on a fixed batch.

    Without biases: the gradient of a key's bias is zero but for rounding, whose sign AdamW would magnify.
    """
    if hasattr(torch.backends, "cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> Any:
        cells = torch.randint(-1024, 1025, shape, generator=generator).to(torch.float64) / 1024
        return cells * (3.0 / shape[-1]) ** 0.5 if len(shape) > 1 else cells

    start = [weight(VOCABULARY, WIDTH), weight(LENGTH, WIDTH)]
    for _ in range(LAYERS):
        start += [1 + 0.1 * weight(WIDTH), weight(3 * WIDTH, WIDTH), weight(WIDTH, WIDTH)]
        start += [1 + 0.1 * weight(WIDTH), weight(4 * WIDTH, WIDTH), weight(WIDTH, 4 * WIDTH)]
    start += [1 + 0.1 * weight(WIDTH), weight(VOCABULARY, WIDTH)]
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator).to(at)
    weights = [w.clone().to(dtype).to(at).requires_grad_() for w in start]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1)
    losses, first_output, gradients = [], None, []
    for step in range(steps):
        logits = _forward(torch, weights, tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first_output = logits.detach().cpu().double()
            gradients = [w.grad.detach().cpu().double() for w in weights]
        optimizer.step()
        losses.append(float(loss.detach().cpu()))
    ended = [w.detach().cpu().double() for w in weights]
    return Trained(first_output, gradients, ended, [e - s for e, s in zip(ended, start)], losses)


def cosine(a: Any, b: Any) -> float:
    """Of two tensors as vectors; 0 when either is zero or not finite, which no sound result is."""
    a, b = a.flatten(), b.flatten()
    value = float((a @ b) / (a.norm() * b.norm()))
    return 0.0 if math.isnan(value) else value


def worst(many: Sequence[Any], reference: Sequence[Any]) -> float:
    return min(cosine(a, b) for a, b in zip(many, reference))


def _forward(torch: Any, weights: Sequence[Any], tokens: Any) -> Any:
    functional = torch.nn.functional
    embedding, position, *layers, last_norm, head = weights
    mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=embedding.dtype, device=embedding.device).triu(1)
    x = functional.embedding(tokens, embedding) + position
    for layer in range(LAYERS):
        norm1, qkv, out, norm2, wide, narrow = layers[6 * layer : 6 * layer + 6]
        split = functional.linear(functional.layer_norm(x, (WIDTH,), norm1), qkv)
        q, k, v = (
            part.view(BATCH, LENGTH, HEADS, WIDTH // HEADS).transpose(1, 2) for part in split.chunk(3, dim=-1)
        )
        scores = torch.softmax(q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5 + mask, dim=-1)
        x = x + functional.linear((scores @ v).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH), out)
        hidden = functional.linear(functional.layer_norm(x, (WIDTH,), norm2), wide)
        x = x + functional.linear(functional.gelu(hidden), narrow)
    return functional.linear(functional.layer_norm(x, (WIDTH,), last_norm), head)
