"""What the benchmarks rest on: operations counted, the stock build they race against, the sums on paper, the record."""

import json

import pytest
import torch
from baseline import StockCascade
from flops import forward_flops, training_flops
from measure import compete
from scaling import scaling_efficiency
from steps import kind_of
from tables import as_markdown, markdown
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.model.cascade import Cascade, CascadeConfig
from lib.project import RECORD
from lib.util.provenance import versions

SMALL = {"num_layers": 2, "num_heads": 4}


def counted(run) -> int:
    """By torch's own counter. It knows attention as the plain products; the fused kernels of a CPU it does not know."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


CONFIGS = [
    CascadeConfig.reference(num_layers=1),
    CascadeConfig.reference(3, **SMALL),
    CascadeConfig.reference(2, width=512, **SMALL),
    CascadeConfig.reference(1, ffn_mult=2, **SMALL),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("T", [5, 24])
def test_the_operations_forward_are_the_counters(config, T):
    model = Cascade(config).eval()
    input, target = torch.randn(2, 3, 128, T)
    with torch.no_grad():
        assert counted(lambda: model(input, target)) == 3 * forward_flops(config, T)


def test_the_operations_of_a_training_step_are_the_counters():
    """But for what needs no gradient: the clips themselves. They meet the weights of the first stage and, without
    parameters between, of no other; and spectral norm's small products, which do not grow with the clip."""
    config = CascadeConfig.reference(num_layers=1)
    totals = {}
    for T in (8, 24):
        model = Cascade(config).train()
        input, target = torch.randn(2, 1, 128, T)
        totals[T] = counted(lambda model=model, x=input, y=target: model(x, y)[0].sum().backward())
    grown = training_flops(config, 24) - training_flops(config, 8)
    assert totals[24] - totals[8] == grown


def test_the_operations_of_the_reference():
    """2 · 15.47 million weights, less biases and norms, a frame; attention grows with the square of the length."""
    config = CascadeConfig.reference()
    matrices = sum(p.numel() for p in Cascade(config).parameters() if p.ndim == 2)
    per_frame = [forward_flops(config, T) / T - 2 * matrices for T in (75, 1200)]
    assert per_frame == [4 * 75 * 6 * (256 + 384), 4 * 1200 * 6 * (256 + 384)]
    assert training_flops(config, 1200) == 3 * forward_flops(config, 1200)


def test_the_baseline_is_the_same_model():
    torch.manual_seed(0)
    cascade = Cascade(CascadeConfig.reference(num_layers=1))
    stock = StockCascade(num_layers=1).copy_from(cascade)
    input, target = torch.randn(2, 2, 128, 50) * torch.tensor([5.0, 3.0])[:, None, None, None]
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in cascade.parameters())
    with torch.no_grad():
        wanted, _ = cascade.eval()(input, target)
        torch.testing.assert_close(stock.eval()(input, target), wanted, rtol=1e-4, atol=1e-4)


def test_the_reference_is_what_the_baseline_builds():
    shapes = [sorted(p.shape for p in build().parameters()) for build in (Cascade, StockCascade)]
    assert shapes[0] == shapes[1]


# --- scaling on paper -------------------------------------------------------------------------------------------------


def test_the_efficiency_of_a_ring_by_hand():
    """Four devices send 2 · 3/4 of 100 bytes at 50 bytes a second: 3 s beside a step of 9 s."""
    assert scaling_efficiency(9.0, 100.0, 50.0, 4, latency=0.0) == pytest.approx(9 / 12)
    assert scaling_efficiency(9.0, 100.0, 50.0, 4, latency=0.5) == pytest.approx(9 / 15)
    assert scaling_efficiency(9.0, 100.0, 50.0, 4, latency=0.0, overlap=1 / 9) == pytest.approx(9 / 11)
    assert scaling_efficiency(9.0, 100.0, 50.0, 4, latency=0.0, overlap=0.5) == 1  # hidden behind the backward pass
    assert scaling_efficiency(9.0, 100.0, 50.0, 1) == 1


def test_more_devices_never_help_the_efficiency_of_each():
    found = [scaling_efficiency(0.1, 62e6, 50e9, n) for n in (1, 2, 8, 64, 512)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("bad", [(0, 1, 1, 2), (1, -1, 1, 2), (1, 1, 0, 2), (1, 1, 1, 0)])
def test_numbers_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="scaling_efficiency needs"):
        scaling_efficiency(*bad)
    with pytest.raises(ValueError, match="overlap from 0 to 1"):
        scaling_efficiency(1, 1, 1, 2, overlap=1.5)


# --- measuring --------------------------------------------------------------------------------------------------------


def allocate(mebibytes):
    return lambda: torch.ones(mebibytes * 2**18).sum().item()


def broken(_):
    return lambda: 1 / 0


def test_contenders_are_timed_apart_and_each_ones_memory_is_its_own():
    small, large = compete((allocate, 16), (allocate, 256), rounds=1)
    assert 0 < small.seconds < large.seconds
    assert 250 < large.peak_mib < 320
    assert small.peak_mib < 100


def test_a_contender_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"broken\(1,\): ZeroDivisionError"):
        compete((broken, 1), rounds=1)


def test_a_markdown_table():
    assert markdown([{"a": 1, "b": "x"}, {"a": 2}]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 |  |\n"


def test_the_recorded_tables_are_the_recorded_numbers():
    found = json.loads((RECORD / "bench.json").read_text())
    assert (RECORD / "bench.md").read_text() == as_markdown(found)
    found["machine"] |= versions()  # as `make bench` stores it; a record names its commit in one file only
    assert (RECORD / "bench.md").read_text() == as_markdown(found)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::normal_", "random numbers"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::_fft_r2c", "Fourier transforms"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "copies"),
        ("aten::mul", "elementwise"),
        ("void multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4, ADAM_MODE::ADAMW>>", "optimizer"),
        ("void GammaBetaBackwardCUDAKernelTemplate<float, float>", "norms"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolutions"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "matrix products"),
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_kernels_are_sorted_by_what_they_do(kernel, kind):
    assert kind_of(kernel) == kind
