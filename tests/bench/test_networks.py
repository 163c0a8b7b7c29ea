"""Comparison of the networks with the reference libraries: both sides must compute the same."""

import sys

import pytest
import torch

from minidrag.bench import networks
from minidrag.bench.__main__ import main
from minidrag.networks.clip import CLIPConfig
from minidrag.networks.unet import UNetConfig
from minidrag.networks.vae import VAEConfig

TINY = networks.Sizes(
    UNetConfig(block_out_channels=(64, 64, 64, 64), cross_attention_dim=24, sample_size=16),
    VAEConfig(block_out_channels=(64, 64)),
    CLIPConfig(hidden_size=24, intermediate_size=96, num_hidden_layers=1),
)


@pytest.mark.parametrize("workload", networks.WORKLOADS, ids=lambda workload: workload.name)
def test_both_sides_of_a_workload_return_the_same_output(workload: networks.Workload) -> None:
    modules = {"reference": networks.build(workload.network, "reference", TINY, "cpu", torch.float32)}
    modules["minidrag"] = networks.build(workload.network, "minidrag", TINY, "cpu", torch.float32)
    networks.share_weights(workload.network, modules["minidrag"], modules["reference"])
    inputs = networks.random_inputs(workload, TINY, "cpu", torch.float32)
    seconds, difference = networks.time_both(workload, modules, inputs, runs=1)
    assert difference < 1e-5
    assert set(seconds) == set(networks.SIDES) and min(seconds.values()) > 0
    ours, reference = (networks.peak_memory(workload, side, modules[side], inputs) for side in networks.SIDES)
    weights = sum(weight.numel() for weight in modules["minidrag"].parameters()) * 4 / 2**20
    assert weights < ours < 1.05 * reference


def test_missing_reference_libraries_give_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["networks"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "pip install 'minidrag[bench]'" in message


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--device", "cuda"]])
def test_invalid_arguments_give_a_one_line_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["networks", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and arguments[0] in message
