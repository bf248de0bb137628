"""The pretended device keeps a GPU's rules: what mixes devices raises, what waits or copies is counted by call site."""

import threading

import numpy as np
import pytest
import torch

from tawin_nemo.maths.segments import segment_log_softmax
from tests.simcuda import device
from tests.simcuda.device import DeviceFault, count
from tests.simcuda.ledger import KINDS
from tests.simcuda.tags import CPU, CUDA, tag_of


@pytest.fixture(autouse=True)
def gpu():
    """Every test of this file runs on the device; faults that a test provokes are forgotten."""
    with device.pretended():
        yield
    device.FAULTS.clear()


def on_device(*values: float) -> torch.Tensor:
    return torch.tensor(values, device="cuda")


def test_a_tensor_is_where_it_was_made():
    assert torch.cuda.is_available()
    assert torch.zeros(2).device.type == "cpu"
    here = torch.zeros(2, device="cuda")
    assert here.device == torch.device("cuda", 0)
    assert here.is_cuda
    assert here.type() == "torch.cuda.FloatTensor"
    for made in (here + 1, here[:1], here.new_ones(3), torch.ones_like(here), here.double(), here.new_tensor([1.0])):
        assert made.is_cuda
    assert not here.cpu().is_cuda
    assert not torch.zeros_like(here, device="cpu").is_cuda
    assert torch.from_numpy(np.zeros(3)).cuda().is_cuda


def test_what_autograd_makes_is_there_as_well():
    weight = torch.nn.Parameter(torch.randn(4, 3).cuda())
    index = torch.tensor([0, 2], device="cuda")
    (weight.index_select(0, index) ** 2).sum().backward()
    assert weight.grad.is_cuda
    moved = torch.nn.Parameter(torch.ones(2))
    (moved.cuda() * on_device(1.0, 2.0)).sum().backward()
    assert not moved.grad.is_cuda
    assert moved.grad.tolist() == [1.0, 2.0]


def test_a_mark_ends_with_its_memory():
    for _ in range(50):  # the allocator hands the same addresses out again
        torch.zeros(64, device="cuda")
        assert tag_of(torch.from_numpy(np.zeros(64, dtype=np.float32))) == CPU
    view = torch.zeros(4, 4, device="cuda")[0]
    assert tag_of(view) == CUDA


@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: here + there,
        lambda here, there: there.add_(here),
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there[here.long()],
        lambda here, there: here.index_select(0, there.long()),
        lambda here, there: here.index_put_((torch.zeros(3).long().cuda(),), there),
        lambda here, there: torch.dot(here, there),
        lambda here, there: torch.tensor(1.0).add_(here.sum()),
        lambda here, there: here.numpy(),
        lambda here, there: np.asarray(here),
        lambda here, there: there.to("cuda:1"),
    ],
    ids=["add", "in place", "cat", "index of a host tensor", "index_select", "index_put", "dot", "0-dim written",
         "numpy", "asarray", "another GPU"],
)  # fmt: skip
def test_mixing_devices_raises(mixed):
    here, there = on_device(0.0, 1.0, 2.0), torch.tensor([0.0, 1.0, 2.0])
    with pytest.raises((DeviceFault, RuntimeError)):
        mixed(here, there)
    assert len(device.FAULTS) == 1


def test_what_a_gpu_takes_is_taken():
    here = on_device(0.0, 1.0, 2.0)
    assert (here * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0]
    assert torch.where(here > 0, here, torch.tensor(-1.0)).tolist() == [-1.0, 1.0, 2.0]
    assert here[torch.tensor([2, 0])].tolist() == [2.0, 0.0]  # copies the index
    here[0] = 5.0
    here[torch.tensor([False, True, False])] = torch.tensor(7.0)
    assert here.tolist() == [5.0, 7.0, 2.0]
    assert not device.FAULTS


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x: x + 1, {"launches": 1}),
        (lambda x: x.view(3, 1).expand(3, 4)[1:], {}),
        (lambda x: torch.empty_like(x), {}),
        (lambda x: torch.zeros(3, device="cuda"), {"launches": 1}),
        (lambda x: x.sum().item(), {"launches": 1, "syncs": 1}),
        (lambda x: bool((x > 0).any()), {"launches": 2, "syncs": 1}),
        (lambda x: x.nonzero(), {"launches": 1, "syncs": 1}),
        (lambda x: x[x > 0], {"launches": 2, "syncs": 1}),
        (lambda x: torch.repeat_interleave(x.long()), {"launches": 2, "syncs": 1}),
        (lambda x: torch.repeat_interleave(x.long(), output_size=3), {"launches": 2}),
        (lambda x: torch.segment_reduce(x, "sum", lengths=x.long()), {"launches": 2, "syncs": 1}),
        (lambda x: torch.segment_reduce(x, "sum", offsets=x.long()), {"launches": 2}),
        (lambda x: x.cpu(), {"d2h": 1, "syncs": 1}),
        (lambda x: x.tolist(), {"d2h": 1, "syncs": 1}),
        (lambda x: torch.ones(3).cuda(), {"h2d": 1, "syncs": 1}),
        (lambda x: torch.ones(3).to("cuda", non_blocking=True), {"h2d": 1}),
        (lambda x: torch.tensor([1.0], device="cuda"), {"h2d": 1, "syncs": 1}),
        (lambda x: x.copy_(torch.ones(3)), {"h2d": 1, "syncs": 1}),
        (lambda x: x[torch.tensor([0])], {"launches": 1, "h2d": 1, "syncs": 1}),
        (lambda x: torch.cuda.synchronize(), {"syncs": 1}),
        (lambda x: torch.ones(3).sum().item(), {}),
    ],
)
def test_costs(work, expected):
    x = on_device(0.0, 1.0, 2.0)
    _, counts = count(lambda: work(x))
    assert counts.totals() == {**dict.fromkeys(KINDS, 0), **expected}


def test_attention_is_one_launch():
    query = torch.randn(1, 2, 5, 8, device="cuda")
    mask = torch.zeros(1, 1, 5, 5, device="cuda")
    attention = torch.nn.functional.scaled_dot_product_attention
    _, counts = count(lambda: attention(query, query, query, attn_mask=mask))
    assert counts.totals() == {**dict.fromkeys(KINDS, 0), "launches": 1}


def test_events_belong_to_the_functions_of_the_product():
    logit_E, position_E = on_device(1.0, 2.0, 3.0), torch.tensor([0, 0, 1], device="cuda")
    _, counts = count(lambda: segment_log_softmax(logit_E, position_E, 2))
    assert {(site.path, site.function) for site in counts.events["launches"]} == {
        ("maths/segments.py", "segment_log_softmax"),
        ("maths/segments.py", "segment_starts"),
    }
    assert "maths/segments.py segment_log_softmax: " in counts.table()


def test_host_memory_is_not_read_before_its_copy_has_arrived():
    host = torch.empty(3, pin_memory=True)
    assert host.is_pinned()
    host.copy_(on_device(1.0, 2.0, 3.0), non_blocking=True)
    with pytest.raises(DeviceFault, match="before its non_blocking copy"):
        host.sum()
    torch.cuda.synchronize()
    assert host.sum() == 6.0


def test_counters_of_a_fused_optimizer_have_to_be_on_the_device():
    parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
    parameter.grad = torch.ones(3, device="cuda")
    optimizer = torch.optim.AdamW([parameter], foreach=False)
    optimizer.param_groups[0].update(fused=True)
    zeros = {name: torch.zeros(3, device="cuda") for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": torch.zeros(()), **zeros}
    with pytest.raises(DeviceFault, match="illegal memory access"):
        optimizer.step()
    optimizer.state[parameter]["step"] = torch.zeros((), device="cuda")
    optimizer.step()


def test_threads_see_the_device():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.zeros(2, device="cuda").is_cuda))
    thread.start()
    thread.join()
    assert seen == [True]
    _, counts = count(lambda: torch.zeros(2, device="cuda"))
    assert counts.total("launches") == 1


def test_recomputation_in_the_backward_pass_sees_the_device():
    from torch.utils.checkpoint import checkpoint

    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        made = torch.ones(3, device="cuda")
        seen.append(made.is_cuda and x.is_cuda)
        return x * made * weight

    checkpoint(layer, torch.ones(3, device="cuda", requires_grad=True), use_reentrant=True).sum().backward()
    assert seen == [True, True]
    assert weight.grad.is_cuda


def test_it_ends_with_the_block():
    here = torch.zeros(2, device="cuda")
    with pytest.raises(DeviceFault):
        here + torch.zeros(2)
    real = torch.cuda.is_available
    with device.pretended():
        assert torch.cuda.is_available is not real
    assert torch.cuda.is_available is real


def test_files_are_loaded_to_the_device(tmp_path):
    torch.save({"weights": [torch.ones(2)], "step": 3}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", map_location=torch.device("cuda"), weights_only=True)
    assert loaded["weights"][0].is_cuda
    assert not torch.load(tmp_path / "state.pt", weights_only=True)["weights"][0].is_cuda
