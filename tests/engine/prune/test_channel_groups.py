"""Which channels go together: a network that is cut computes what the whole one does with those channels silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_networks import IMAGE, Grouped, Plain, Residual, write_tiny
from torch import Tensor, nn

from app.errors import InvalidRequest
from workers.engine.onnx_network import Network, read_network, write_network
from workers.engine.onnx_network.reading import check_same
from workers.engine.prune.channel_budget import Target, choose, chosen_counts
from workers.engine.prune.channel_cut import cut, estimate_norms, repair
from workers.engine.prune.channel_groups import find_channels
from workers.engine.prune.channel_layout import Channels
from workers.engine.prune.channel_statistics import loss_changes, observe


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[type[nn.Module], Path]:
    directory = tmp_path_factory.mktemp("networks")
    return {
        kind: write_tiny(kind, directory / f"{kind.__name__}.onnx") for kind in (Plain, Residual, Grouped)
    }


def images(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def every_other(channels: Channels) -> dict[int, Tensor]:
    return {space: torch.arange(0, channels.sizes[space], 2) for space in channels.free}


def silenced(network: Network, channels: Channels, kept: dict[int, Tensor]) -> None:
    """Nothing reads the channels that would go."""
    for axis in channels.axes:
        if axis.role == "reads":
            array = network.array(axis.array).detach().clone()
            mask = torch.zeros(array.shape[axis.axis], dtype=torch.bool)
            mask[channels.index(axis.layout, kept)] = True
            shape = [1] * array.dim()
            shape[axis.axis] = -1
            network.set_array(axis.array, array * mask.view(shape))


@pytest.mark.parametrize("kind", [Plain, Residual, Grouped])
def test_a_cut_network_is_the_whole_one_with_channels_silent(
    kind: type[nn.Module], paths: dict[type[nn.Module], Path], tmp_path: Path
) -> None:
    small, silent = read_network(paths[kind]), read_network(paths[kind])
    channels = find_channels(small)
    kept = every_other(channels)
    cut(small, channels, kept)
    silenced(silent, channels, kept)
    with torch.no_grad():
        torch.testing.assert_close(small(images()), silent(images()), rtol=1e-4, atol=1e-5)
    counts = {space: len(found) for space, found in kept.items()}
    write_network(small, tmp_path / "small.onnx")
    check_same(small, tmp_path / "small.onnx", threads=1)
    assert find_channels(read_network(tmp_path / "small.onnx")).macs() == channels.macs(counts)


def test_additions_and_depthwise_convolutions_tie_channels(paths: dict[type[nn.Module], Path]) -> None:
    channels = find_channels(read_network(paths[Residual]))
    # Stem and the end of the block; the wide part with its depthwise convolution and its gate; the gate's inside; branch; last.
    assert sorted(channels.sizes[space] for space in channels.free) == [8, 8, 16, 24, 32]


def test_grouped_convolutions_keep_their_channels(paths: dict[type[nn.Module], Path]) -> None:
    channels = find_channels(read_network(paths[Grouped]))
    assert [channels.sizes[space] for space in channels.free] == [24]


def test_multiplications_are_those_of_the_layers(paths: dict[type[nn.Module], Path]) -> None:
    channels = find_channels(read_network(paths[Plain]))
    assert channels.macs() == 256 * 9 * (3 * 16 + 16 * 24) + 24 * 64 * 32 + 32 * 5


def test_repair_makes_duplicate_channels_dispensable(paths: dict[type[nn.Module], Path]) -> None:
    """Of two channels that say the same one can go, and nothing changes."""
    network = read_network(paths[Plain])
    channels = find_channels(network)
    first = network.calls[0]
    norm = next(call for call in network.calls if call.operator == "BatchNormalization")
    for name in (first.weight, first.bias, *norm.inputs[1:]):
        array = network.array(name or "").detach().clone()
        array[1::2] = array[::2]
        network.set_array(name or "", array)
    with torch.no_grad():
        before = network(images(seed=3))
    (space,) = {segment.space for segment in channels.layouts[first.output]}
    kept = {space: torch.arange(0, 16, 2)}
    seen = observe(network, channels, images(32), lambda _: None)
    repair(network, channels, kept, seen)
    cut(network, channels, kept)
    with torch.no_grad():
        torch.testing.assert_close(network(images(seed=3)), before, rtol=2e-2, atol=2e-2)


def test_norms_are_estimated_as_the_mean_over_batches(paths: dict[type[nn.Module], Path]) -> None:
    network = read_network(paths[Plain])
    inputs: list[Tensor] = []
    norm = next(call for call in network.calls if call.operator == "BatchNormalization")
    data = images(128)
    estimate_norms(network, data)
    with torch.no_grad():
        network(data, lambda call, given, _: inputs.append(given[0]) if call is norm else None)
    torch.testing.assert_close(
        network.array(norm.inputs[3] or ""), inputs[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4
    )


def test_taylor_scores_are_the_squared_gradients_of_gates(paths: dict[type[nn.Module], Path]) -> None:
    """The gate of a channel multiplies it where it is read: its gradient, by finite differences."""
    network = read_network(paths[Plain])
    channels = find_channels(network)
    network.double()
    data, labels = images(4).double(), torch.tensor([0, 1, 2, 3])
    found = loss_changes(network, channels, data, labels, lambda _: None)
    space = next(iter(channels.free))
    axis = next(iter(channels.axes_of(space, "reads")))
    weight = network.array(axis.array).detach().clone()
    rows = channels.rows(axis, torch.arange(weight.numel()).view(weight.shape), space)[2].long()
    losses = []
    for factor in (1 + 1e-6, 1 - 1e-6):
        changed = weight.clone().flatten()
        changed[rows] *= factor
        network.set_array(axis.array, changed.view(weight.shape))
        with torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(network(data), labels)))
    gradient = (losses[0] - losses[1]) / 2e-6
    assert float(found[space][2]) == pytest.approx(gradient**2, rel=1e-3)


def test_the_target_is_met_with_multiples_and_a_floor(paths: dict[type[nn.Module], Path]) -> None:
    channels = find_channels(read_network(paths[Residual]))
    scores = {space: torch.rand(channels.sizes[space]) for space in channels.free}
    target = Target("macs", 0.6, floor=0.5, round_to=4)
    counts = chosen_counts(channels, scores, target)
    assert channels.macs(counts) <= 0.6 * channels.macs()
    for space, count in counts.items():
        assert count % 4 == 0
        assert count >= 0.5 * channels.sizes[space]


def test_the_lowest_scores_go(paths: dict[type[nn.Module], Path]) -> None:
    channels = find_channels(read_network(paths[Grouped]))
    (space,) = channels.free
    scores = {space: torch.arange(24.0).flip(0)}
    kept = choose(channels, scores, Target("channels", 0.5, floor=0.0, round_to=4), by_space=True)
    assert kept[space].tolist() == list(range(12))


def test_a_target_out_of_reach_is_refused_with_what_is_left(paths: dict[type[nn.Module], Path]) -> None:
    channels = find_channels(read_network(paths[Grouped]))
    scores = {space: torch.rand(channels.sizes[space]) for space in channels.free}
    with pytest.raises(InvalidRequest, match=r"out of reach: .* 0\.\d+ are left"):
        chosen_counts(channels, scores, Target("macs", 0.01, floor=0.1, round_to=8))
