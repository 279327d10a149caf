"""The same MAML outer step in PyTorch: the number a JAX benchmark has to be held against.

MAML learns an initialisation eta. For each task i, with support set S_i and query set Q_i,

    theta_i = eta - alpha grad L(eta; S_i)        one inner SGD step, alpha = 0.4
    F(eta)  = mean_i L(theta_i; Q_i)              the outer loss over 16 tasks

and Adam (1e-3) descends the exact gradient of F, second-order term included: the inner
gradient is taken with `create_graph=True`, or with nested `torch.func` transforms.

The workload is Omniglot in shape, not in content: random 28x28x1 images, 5-way 1-shot, 25
query images. Four convolutions of 64 filters 3x3, stride 2, padding 1 (28 -> 14 -> 7 -> 4 ->
2), each followed by batch norm with the statistics of the batch and a ReLU; a mean over
the 2x2 pixels that remain; a linear head of 5. That is 112,261 parameters, all adapted.

Variants, which compute the same loss and gradient (`--check` shows how closely):

    loop      tasks one after the other, `F.conv2d` on a dict of parameters. One task's
              graph is alive at a time: the least memory.
    vmap      `torch.func.vmap` over tasks of `torch.func.grad`. The query pass has a kernel
              per task, so its convolutions become grouped ones; all graphs are alive at
              once: memory grows with the tasks.
    torchopt  an `nn.Module` and TorchOpt's `MetaSGD`, tasks one after the other.

PyTorch's own convolution is used: as patches + matmul, the trick that helps XLA, it ran at
about two thirds of the speed on an idle CPU of two cores. `torch.compile` is left out: it
took over a minute to compile the outer step, with no gain seen afterwards.

This file imports nothing of the package, so that it can have an environment of its own:

    python -m venv .venv-torch
    .venv-torch/bin/pip install -r experiments/benchmarks/pytorch.lock
    .venv-torch/bin/python experiments/benchmarks/pytorch_maml.py --variant=loop --threads=2

It prints one JSON line per variant (`--variant=all` runs each). Tasks per second is the
median over the steps after one warm-up; a step is the outer gradient and the Adam update,
with the images already in memory. Measure on an idle machine: when other processes hold the
cores, PyTorch's threads wait for each other and the figure falls by an order of magnitude.

References: Finn, Abbeel and Levine 2017, arXiv:1703.03400 (MAML); Ren et al. 2022,
arXiv:2211.06934 (TorchOpt).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

WAYS, FILTERS, LAYERS, SIDE = 5, 64, 4, 28
INNER_LR, OUTER_LR, EPSILON = 0.4, 1e-3, 1e-5

Params = dict[str, torch.Tensor]


class Episodes(NamedTuple):
    """A batch of tasks; the leading axis is the task."""

    support_x: torch.Tensor  # (tasks, 5, 1, 28, 28)
    support_y: torch.Tensor  # (tasks, 5), int64
    query_x: torch.Tensor  # (tasks, queries, 1, 28, 28)
    query_y: torch.Tensor  # (tasks, queries), int64


# An outer gradient adds dF/d eta to the `.grad` of each parameter and returns F(eta).
OuterGradient = Callable[[Episodes], float]


def make_params(dtype: torch.dtype, seed: int = 0) -> Params:
    """He-normal kernels, zero biases, unit scales; drawn in float32 for every dtype."""
    draw = torch.Generator().manual_seed(seed)
    params, fan_in = {}, 1
    for i in range(LAYERS):
        kernel = torch.randn(FILTERS, fan_in, 3, 3, generator=draw)
        params[f"conv{i}.weight"] = kernel * (2 / (9 * fan_in)) ** 0.5
        params[f"conv{i}.bias"] = torch.zeros(FILTERS)
        params[f"norm{i}.weight"] = torch.ones(FILTERS)
        params[f"norm{i}.bias"] = torch.zeros(FILTERS)
        fan_in = FILTERS
    params["head.weight"] = torch.randn(WAYS, FILTERS, generator=draw) / FILTERS**0.5
    params["head.bias"] = torch.zeros(WAYS)
    return {name: p.to(dtype).requires_grad_() for name, p in params.items()}


def make_episodes(tasks: int, queries: int, dtype: torch.dtype, seed: int = 1) -> Episodes:
    """Random images; labels in turn 0..4."""
    draw = torch.Generator().manual_seed(seed)

    def images(count):
        return torch.rand(tasks, count, 1, SIDE, SIDE, generator=draw).to(dtype)

    def labels(count):
        return (torch.arange(count) % WAYS).repeat(tasks, 1)

    return Episodes(images(WAYS), labels(WAYS), images(queries), labels(queries))


def fused_norm(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """PyTorch's own batch norm, with the statistics of the batch."""
    return F.batch_norm(x, None, None, scale, offset, training=True, eps=EPSILON)


def plain_norm(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The same from elementary operations, for `vmap`.

    There, with torch 2.13, `fused_norm` gave an outer gradient 0.3% off the central
    difference, in float64; this agrees with it, and was no slower.
    """
    centred = x - x.mean((0, 2, 3), keepdim=True)
    variance = centred.square().mean((0, 2, 3), keepdim=True)
    scaled = centred * (torch.rsqrt(variance + EPSILON) * scale.view(1, -1, 1, 1))
    return scaled + offset.view(1, -1, 1, 1)


def loss_fn(params: Params, x: torch.Tensor, y: torch.Tensor, norm=fused_norm) -> torch.Tensor:
    """Mean cross-entropy of the network; `x` is (batch, 1, 28, 28)."""
    for i in range(LAYERS):
        x = F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], stride=2, padding=1)
        scale, offset = params[f"norm{i}.weight"], params[f"norm{i}.bias"]
        x = F.relu(norm(x, scale, offset))
    logits = F.linear(x.mean((2, 3)), params["head.weight"], params["head.bias"])
    return F.cross_entropy(logits, y)


def loop(params: Params) -> OuterGradient:
    """Tasks one after the other; each frees its graph before the next begins."""

    def outer_gradient(episodes):
        total = 0.0
        for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
            inner_loss = loss_fn(params, support_x, support_y)
            grads = torch.autograd.grad(inner_loss, list(params.values()), create_graph=True)
            adapted = {
                name: p - INNER_LR * g for (name, p), g in zip(params.items(), grads, strict=True)
            }
            outer_loss = loss_fn(adapted, query_x, query_y) / len(episodes.query_x)
            outer_loss.backward()
            total += outer_loss.item()
        return total

    return outer_gradient


def vmap(params: Params) -> OuterGradient:
    """All tasks at once: `torch.func.vmap` of one task's adapted loss."""

    def task_loss(params, support_x, support_y, query_x, query_y):
        grads = torch.func.grad(loss_fn)(params, support_x, support_y, plain_norm)
        adapted = {name: p - INNER_LR * grads[name] for name, p in params.items()}
        return loss_fn(adapted, query_x, query_y, plain_norm)

    all_tasks = torch.func.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))

    def outer_gradient(episodes):
        outer_loss = all_tasks(params, *episodes).mean()
        outer_loss.backward()
        return outer_loss.item()

    return outer_gradient


class ConvNet(torch.nn.Module):
    """The network of `loss_fn` as a module; its parameters are those of `params`."""

    def __init__(self, params: Params):
        super().__init__()
        for i in range(LAYERS):
            fan_in = FILTERS if i else 1
            conv = torch.nn.Conv2d(fan_in, FILTERS, 3, stride=2, padding=1)
            norm = torch.nn.BatchNorm2d(FILTERS, eps=EPSILON, track_running_stats=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", norm)
        self.head = torch.nn.Linear(FILTERS, WAYS)
        for name, p in params.items():  # the same leaves, so that `.grad` lands on them
            owner, leaf = name.split(".")
            self.get_submodule(owner)._parameters[leaf] = p

    def forward(self, x):
        for i in range(LAYERS):
            x = self.get_submodule(f"conv{i}")(x)
            x = F.relu(self.get_submodule(f"norm{i}")(x))
        return self.head(x.mean((2, 3)))


def torchopt(params: Params) -> OuterGradient:
    """TorchOpt's differentiable SGD on a module, as in the MAML example of its manual."""
    import torchopt as library  # the other variants do without it

    net = ConvNet(params)
    inner = library.MetaSGD(net, lr=INNER_LR)

    def outer_gradient(episodes):
        total = 0.0
        start = library.extract_state_dict(net), library.extract_state_dict(inner)
        for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
            inner.step(F.cross_entropy(net(support_x), support_y))
            outer_loss = F.cross_entropy(net(query_x), query_y) / len(episodes.query_x)
            outer_loss.backward()
            total += outer_loss.item()
            library.recover_state_dict(net, start[0])
            library.recover_state_dict(inner, start[1])
        return total

    return outer_gradient


VARIANTS = {"loop": loop, "vmap": vmap, "torchopt": torchopt}


def measure(variant: str, tasks: int, queries: int, steps: int) -> float:
    """Tasks per second: the median over `steps` outer steps after one warm-up."""
    params = make_params(torch.float32)
    episodes = make_episodes(tasks, queries, torch.float32)
    outer_gradient = VARIANTS[variant](params)
    adam = torch.optim.Adam(params.values(), lr=OUTER_LR)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        adam.zero_grad()
        outer_gradient(episodes)
        adam.step()
        seconds.append(time.perf_counter() - start)
    return tasks / statistics.median(seconds[1:])


def check(variants: list[str], tasks: int, queries: int) -> None:
    """Print each variant's loss and its gradient's distance from `loop`'s, in float64."""
    reference = None
    for variant in variants:
        params = make_params(torch.float64)
        loss = VARIANTS[variant](params)(make_episodes(tasks, queries, torch.float64))
        gradient = torch.cat([p.grad.flatten() for p in params.values()])
        reference = gradient if reference is None else reference
        error = ((gradient - reference).norm() / reference.norm()).item()
        line = {"variant": variant, "loss": loss, "relative_gradient_error": error}
        print(json.dumps(line, allow_nan=False), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MAML outer steps in PyTorch, timed.")
    parser.add_argument("--variant", choices=[*VARIANTS, "all"], default="loop")
    parser.add_argument("--tasks", type=int, default=16, help="tasks per outer step")
    parser.add_argument("--queries", type=int, default=25, help="query images per task")
    parser.add_argument("--steps", type=int, default=6, help="timed outer steps")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--check", action="store_true", help="compare variants, time nothing")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.check:
        check(list(VARIANTS), args.tasks, args.queries)
        return
    for variant in VARIANTS if args.variant == "all" else [args.variant]:
        line = {
            "variant": variant,
            "tasks_per_second": measure(variant, args.tasks, args.queries, args.steps),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(line, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
