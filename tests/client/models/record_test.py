"""certiq.torch.record: which linears share an input, what is summed, what comes back."""

from typing import Any, Literal

import certiq
import certiq.torch
import models
import numpy as np
import pytest
import torch
from certiq.torch.sums import GramAccumulator
from torch import nn

DECODER_GROUPS = {
    "self_attn.q_proj": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    "self_attn.o_proj": {"self_attn.o_proj"},
    "mlp.gate_proj": {"mlp.gate_proj", "mlp.up_proj"},
    "mlp.down_proj": {"mlp.down_proj"},
}
GROUPS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model.layers", DECODER_GROUPS)),
    "gpt2": (
        "transformer.h",
        {name: {name} for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    ),
    "opt": (
        "model.decoder.layers",
        {
            "self_attn.q_proj": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
            "self_attn.out_proj": {"self_attn.out_proj"},
            "fc1": {"fc1"},
            "fc2": {"fc2"},
        },
    ),
    "bert": (
        "encoder.layer",
        {
            "attention.self.query": {
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
            },
            "attention.output.dense": {"attention.output.dense"},
            "intermediate.dense": {"intermediate.dense"},
            "output.dense": {"output.dense"},
        },
    ),
}


def token_ids(batch: int = 4, positions: int = 48, seed: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, models.VOCABULARY, (batch, positions), generator=made)


def within(stack: str) -> Any:  # noqa: ANN401
    return lambda name, _: name.startswith(f"{stack}.")


def inputs_of(model: nn.Module, name: str, ids: list[torch.Tensor]) -> np.ndarray:
    """What one linear reads, seen by a hook of this test's own, float64."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, arguments, output: seen.append(arguments[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for batch in ids:
            model(input_ids=batch)
    handle.remove()
    return torch.cat(seen).double().numpy()


def assert_sums(calibration: certiq.Calibration, X: np.ndarray) -> None:
    """|Delta H_ij| <= 1e-6 sqrt(H_ii H_jj): the contract's promise."""
    sums = calibration.export_statistics()
    assert sums.tokens == len(X)
    H = X.T @ X
    diagonal = np.sqrt(np.diag(H))
    assert np.all(np.abs(sums.gram - H) <= 1e-6 * np.outer(diagonal, diagonal))


@pytest.mark.parametrize("name", GROUPS)
def test_linears_that_read_one_tensor_share_a_calibration(name: str, client: certiq.Client) -> None:
    stack, expected = GROUPS[name]
    model = models.make(name)
    ids = [token_ids(seed=1), token_ids(batch=2, seed=2)]
    with (
        torch.no_grad(),
        certiq.torch.record(model, client, select=within(stack)) as recording,
    ):
        for batch in ids:
            model(input_ids=batch)
    found = {group: set(own.members) for group, own in recording.groups.items()}
    assert found == {
        f"{stack}.{layer}.{leader}": {f"{stack}.{layer}.{member}" for member in members}
        for layer in range(2)
        for leader, members in expected.items()
    }
    assert recording.unreached == ()
    for group in recording.groups.values():
        assert group.tokens == 6 * 48
        assert_sums(group.calibration, inputs_of(model, group.name, ids))
    recording.delete()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantized_weights_have_the_certified_error(name: str, client: certiq.Client) -> None:
    model = models.make(name)
    stack, _ = GROUPS[name]
    ids = [token_ids(batch=8)]
    linear = f"{stack}.1.{'mlp.down_proj' if name == 'llama' else 'mlp.c_proj'}"
    X = inputs_of(model, linear, ids)
    W = certiq.torch.weight_of(model.get_submodule(linear)).double().numpy().copy()
    with torch.no_grad(), certiq.torch.record(model, client, select=within(stack)) as recording:
        model(input_ids=ids[0])
    layers = recording.quantize(certiq.Spec(bits=4, format="gptq"))
    recording.apply(layers)
    recording.delete()
    assert set(layers) == {name for group in recording.groups.values() for name in group.members}
    Q = certiq.torch.weight_of(model.get_submodule(linear)).double().numpy()
    error = np.linalg.norm(X @ (W - Q).T) / np.linalg.norm(X @ W.T)
    assert layers[linear].relative_error == pytest.approx(error, rel=1e-4)
    assert 0 < error < 0.2


def test_client_sums_are_the_sums_of_the_rows(client: certiq.Client) -> None:
    model = models.make("llama")
    ids = token_ids(batch=24, positions=64)
    exported = {}
    for sums in ("server", "client"):
        with (
            torch.no_grad(),
            certiq.torch.record(
                model, client, select=within("model.layers.1"), sums=sums, held_out_fraction=0.25
            ) as recording,
        ):
            # Calls that do not end where blocks do.
            for batch in ids.split(5):
                model(input_ids=batch)
        exported[sums] = {
            name: [group.calibration.export_statistics(held_out=part) for part in (False, True)]
            for name, group in recording.groups.items()
        }
        recording.delete()
    assert exported["server"].keys() == exported["client"].keys()
    for name, portions in exported["server"].items():
        for ours, theirs in zip(exported["client"][name], portions, strict=True):
            assert ours.tokens == theirs.tokens > 0
            diagonal = np.sqrt(np.diag(theirs.gram))
            assert np.all(np.abs(ours.gram - theirs.gram) <= 2e-6 * np.outer(diagonal, diagonal))


def test_padding_is_not_calibrated_on(client: certiq.Client) -> None:
    model = models.make("llama")
    ids = token_ids(batch=3, positions=40)
    mask = torch.ones_like(ids)
    mask[0, 25:] = 0
    mask[2, :10] = 0
    name = "model.layers.0.mlp.gate_proj"
    rows: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, arguments, output: rows.append(arguments[0].detach()[mask.bool()])
    )
    with (
        torch.no_grad(),
        certiq.torch.record(model, client, select=lambda own, _: own == name) as recording,
    ):
        model(input_ids=ids, attention_mask=mask)
    handle.remove()
    assert recording.groups[name].tokens == int(mask.sum()) == 3 * 40 - 25
    assert_sums(recording.calibration_of(name), torch.cat(rows).double().numpy())
    recording.delete()


def test_experts_see_the_tokens_that_are_routed_to_them(client: certiq.Client) -> None:
    model = models.make("mixtral")
    never, _ = models.starve_experts(model)
    ids = token_ids(batch=4)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        names = certiq.torch.take_experts_apart(model)
        after = model(input_ids=ids).logits
    assert list(names) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert torch.allclose(before, after, atol=1e-5)
    with (
        torch.no_grad(),
        certiq.torch.record(model, client, select=within("model.layers")) as recording,
    ):
        model(input_ids=ids)
    unreached = {
        f"model.layers.{layer}.mlp.experts.{never}.{projection}_proj"
        for layer in range(2)
        for projection in ("gate", "up", "down")
    }
    assert unreached <= set(recording.unreached)
    gates = [
        group
        for group in recording.groups.values()
        if group.name.startswith("model.layers.0.mlp.experts.") and "gate" in group.name
    ]
    # Two experts for each of the tokens.
    assert sum(group.tokens for group in gates) == 2 * ids.numel()
    assert all(
        set(group.members) == {group.name, group.name.replace("gate", "up")} for group in gates
    )
    recording.delete()


class Parts(nn.Module):
    """Reads one tensor with both linears, or another one with the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 8)
        self.second = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, apart: bool) -> torch.Tensor:
        return self.first(x) + self.second(x + 1 if apart else x)


def test_inputs_that_stop_being_shared_are_refused(client: certiq.Client) -> None:
    model = Parts()
    x = torch.randn(32, 16)
    with (
        pytest.raises(certiq.torch.SharedInputError, match="first and another one later"),
        certiq.torch.record(model, client),
    ):
        model(x, apart=False)
        model(x, apart=True)
    with certiq.torch.record(model, client, share_inputs=False) as recording:
        model(x, apart=False)
        model(x, apart=True)
    assert {name: group.tokens for name, group in recording.groups.items()} == {
        "first": 64,
        "second": 64,
    }
    recording.delete()


def test_hooks_go_when_the_block_ends(client: certiq.Client) -> None:
    model = Parts()
    with certiq.torch.record(model, client) as recording:
        model(torch.randn(8, 16), apart=False)
    model(torch.randn(8, 16), apart=True)
    assert recording.groups["first"].tokens == 8
    assert not model.first._forward_pre_hooks
    recording.delete()


def test_what_cannot_be_recorded_is_said(client: certiq.Client) -> None:
    with pytest.raises(ValueError, match="no linears"):
        certiq.torch.record(nn.ReLU(), client)
    with pytest.raises(ValueError, match="'server' or 'client'"):
        certiq.torch.record(Parts(), client, sums="gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("sums", ["server", "client"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(
    client: certiq.Client, sums: Literal["server", "client"], value: float
) -> None:
    x = torch.randn(400, 16)
    x[303, 5] = value
    model = Parts()
    with (
        pytest.raises(
            certiq.InvalidArgument, match=rf"^first: .*x.*finite.*{value} at row 303, column 5"
        ),
        certiq.torch.record(model, client, sums=sums),
    ):
        model(x, apart=False)


def test_values_whose_squares_pass_float32_are_refused(client: certiq.Client) -> None:
    x = torch.randn(8, 16)
    x[3, 5] = 1e30
    model = Parts()
    with (
        pytest.raises(
            certiq.InvalidArgument, match=r"^first: x: .*squares.*e\+30 at row 3, col.* 5"
        ),
        certiq.torch.record(model, client, sums="client"),
    ):
        model(x, apart=False)


def test_weights_that_are_not_finite_name_their_linear(client: certiq.Client) -> None:
    model = Parts()
    with certiq.torch.record(model, client) as recording:
        model(torch.randn(64, 16), apart=False)
    with torch.no_grad():
        model.first.weight[2, 3] = float("inf")
    with pytest.raises(
        certiq.InvalidArgument, match=r"^first: weight.data: .*inf at row 2, column 3"
    ):
        recording.quantize()
    recording.delete()


def test_sums_of_half_precision_rows_are_exact_enough() -> None:
    x = torch.randn(1000, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    sums = GramAccumulator(24, x.device, stream_id="s", held_out_fraction=0.0, block_rows=256)
    for piece in x.split(77):
        sums.add(piece)
    H = (x.double().T @ x.double()).numpy()
    diagonal = np.sqrt(np.diag(H))
    assert sums.fit.tokens == 1000
    assert np.all(np.abs(sums.fit.gram.numpy() - H) <= 1e-6 * np.outer(diagonal, diagonal))
