"""AdamW for bfloat16 weights against torch's float32 AdamW: the figures in optimizer.py, the 16
bits, and a resume."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing import optimizer as split_adamw
from plumbing.optimizer import SplitAdamW, join, split
from tests.test_train_source_layer import log_of, small_run, write_world
from train_source_layer import main


def kahan(p, update, state):
    """Kahan summation in bfloat16: what an addition loses is added to the next update."""
    update = update.bfloat16() + state.setdefault("lost", torch.zeros_like(p))
    new = p + update
    state["lost"] = update - (new - p)
    p.copy_(new)


def stochastic(p, update, state):
    """Rounded up or down at random, by how near either is."""
    bits = (p.float() + update).view(torch.int32) + torch.randint(2**16, p.shape, dtype=torch.int32)
    p.copy_((bits & -(2**16)).view(torch.float32))


def walk(kind, size, updates=400, lr=1e-5):
    """How far weights of a size move under noisy gradients -> [n] float32. kahan, stochastic: what
    a float32 optimizer would do, added so."""
    if callable(kind):
        torch.manual_seed(0)
        start, slope, state = (size * torch.randn(20_000)).bfloat16(), 0.3 * torch.randn(20_000), {}
        p, shadow = start.clone(), torch.nn.Parameter(start.float())
        optimizer = torch.optim.AdamW([shadow], lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        for i in range(updates):
            before = shadow.detach().clone()
            shadow.grad = 1e-3 * (
                torch.randn(20_000, generator=torch.Generator().manual_seed(i)) + slope
            )
            optimizer.step()
            kind(p, shadow.detach() - before, state)
        return p.float() - start.float()
    torch.manual_seed(0)
    start, slope = (size * torch.randn(20_000)).bfloat16(), 0.3 * torch.randn(20_000)
    p = torch.nn.Parameter(start.float() if kind == "float32" else start.clone())
    optimizer = (SplitAdamW if kind == "split" else torch.optim.AdamW)(
        [p], lr=lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    for i in range(updates):
        p.grad = (
            1e-3 * (torch.randn(20_000, generator=torch.Generator().manual_seed(i)) + slope)
        ).to(p.dtype)
        optimizer.step()
    return (
        join(p.detach(), optimizer.state[p]["low"]) if kind == "split" else p.detach().float()
    ) - start.float()


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_it_walks_as_float32_does_and_plain_bfloat16_stands_still(size):
    exact, ours, plain = (walk(kind, size) for kind in ("float32", "split", "bfloat16"))
    assert (ours - exact).norm() < 0.003 * exact.norm()
    assert (plain - exact).norm() > 0.9 * exact.norm()
    off = [
        ((walk(kind, size) - exact).norm() / exact.norm()).item() for kind in (kahan, stochastic)
    ]
    assert off == pytest.approx({0.02: [0.03, 0.29], 1.0: [0.80, 2.0]}[size], rel=0.1)


def test_in_float32_it_is_torchs_adamw():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.ones(7, 5)) for _ in range(2)]
    optimizers = [
        kind([p], lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
        for kind, p in zip((SplitAdamW, torch.optim.AdamW), weights)
    ]
    for _ in range(20):
        gradient = torch.randn(7, 5)
        for p, optimizer in zip(weights, optimizers):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.floats(
            width=32,
            allow_nan=False,
            allow_infinity=False,
            allow_subnormal=False,
            min_value=-(2.0**127),
            max_value=2.0**127,
        ),
        min_size=1,
        max_size=20,
    )
)
def test_join_gives_back_what_split_took(values):
    x = torch.tensor(values)
    high, low = split(x)
    assert high.dtype == low.dtype == torch.bfloat16 and torch.equal(high, x.bfloat16())
    assert (
        (join(high, low).view(torch.int32) - x.view(torch.int32)).abs() <= 1
    ).all()  # one unit in the last place, for ties


def test_what_float32_weights_left_goes_on_with_its_16_bits():
    p = torch.nn.Parameter(torch.ones(50))
    old = SplitAdamW([p], lr=1e-5)
    p.grad = torch.ones(50)
    old.step()
    q = torch.nn.Parameter(p.detach().bfloat16())
    new = SplitAdamW([q], lr=1e-5)
    new.load_state_dict(old.state_dict())
    for _ in range(20):
        q.grad = torch.ones(50).bfloat16()
        new.step()
    torch.testing.assert_close(
        join(q.detach(), new.state[q]["low"]), torch.full((50,), 1 - 20e-5), rtol=0, atol=5e-6
    )


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="beta2 0.999"):
        SplitAdamW([torch.nn.Parameter(torch.ones(3).bfloat16())], betas=(0.9, 0.999))
    SplitAdamW([torch.nn.Parameter(torch.ones(3))], betas=(0.9, 0.999))
    odd = torch.nn.Parameter(
        torch.ones(3, 4).bfloat16().T
    )  # in another order in memory: loud, not silently left alone
    odd.grad = torch.ones(4, 3).bfloat16()
    with pytest.raises(RuntimeError, match="view"):
        SplitAdamW([odd]).step()


def test_pieces_make_no_difference(monkeypatch):
    whole = walk("split", 0.02, updates=5)
    monkeypatch.setattr(split_adamw, "PIECE", 999)
    assert torch.equal(whole, walk("split", 0.02, updates=5))


def test_its_state_survives_a_save(tmp_path):
    """To the last bit, the 16 bits too: load_state_dict casts what it loads to the parameter's
    type."""

    def run(resume_at):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(100).bfloat16())
        optimizer = SplitAdamW([p], lr=1e-4)
        for i in range(8):
            if i == resume_at:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                p = torch.nn.Parameter(p.detach().clone())
                optimizer = SplitAdamW([p], lr=1.0)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            p.grad = torch.randn(100, generator=torch.Generator().manual_seed(i)).bfloat16()
            optimizer.step()
        return join(p.detach(), optimizer.state[p]["low"])

    assert torch.equal(run(None), run(4))


def test_a_state_of_the_other_type_goes_on():
    """What sharding trained in bfloat16 may be float32 without it, and the other way round."""
    torch.manual_seed(0)
    start, gradient = torch.randn(50), torch.randn(50)
    for first, then in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        parameters = [torch.nn.Parameter(start.to(dtype)) for dtype in (first, then)]
        optimizers = [SplitAdamW([p], lr=0.1) for p in parameters]
        parameters[0].grad = gradient.to(first)
        optimizers[0].step()
        optimizers[1].state[parameters[1]] = optimizers[0].state[parameters[0]]
        before = parameters[1].detach().clone()
        parameters[1].grad = gradient.to(then)
        optimizers[1].step()
        moved = (parameters[1] - before).detach().float()
        assert ((moved + 0.1 * gradient.sign()).abs() < 0.03).all()


@pytest.mark.slow
def test_training_with_16_bit_weights_follows_float32_and_resumes(tmp_path):
    world = write_world(tmp_path)
    for weights in ("float32", "bfloat16"):
        main(
            small_run(
                world,
                tmp_path / weights,
                "--weights",
                weights,
                "--max-steps",
                "8",
                "--save-every",
                "4",
            )
        )
    exact, ours = log_of(tmp_path / "float32"), log_of(tmp_path / "bfloat16")
    assert [line["sft"] for line in ours] == pytest.approx([line["sft"] for line in exact], rel=0.1)
    assert (
        json.loads((tmp_path / "bfloat16" / "step-0000008" / "config.json").read_text())["dtype"]
        == "bfloat16"
    )
    main(
        small_run(
            world,
            tmp_path / "again",
            "--weights",
            "bfloat16",
            "--max-steps",
            "8",
            "--resume",
            str(tmp_path / "bfloat16" / "step-0000004"),
        )
    )
    assert [line["loss"] for line in log_of(tmp_path / "again")] == [
        line["loss"] for line in ours[4:]
    ]
