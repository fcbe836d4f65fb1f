"""NEFTune's noise: scaled by a row's own length, however the rows are laid out."""

from __future__ import annotations

import pytest
import torch

from fastalign.data.packing import lay_out
from fastalign.models.noise import noisy_embeddings, row_lengths

EXAMPLES = [
    {"prompt_ids": [5, 6, 7], "completion_ids": [[8, 9], [10]]},
    {"prompt_ids": [11], "completion_ids": [[12] * 6, [13]]},
]


def test_a_token_counts_the_tokens_of_its_own_row():
    packed = lay_out(EXAMPLES, "shared", pad_token_id=0)
    assert row_lengths(packed)[0].tolist() == [5, 5, 5, 5, 5, 4, 7, *[7] * 6, 2]
    apart = lay_out(EXAMPLES, "packed", pad_token_id=0)
    assert row_lengths(apart)[0].tolist() == [5] * 5 + [4] * 4 + [7] * 7 + [2] * 2
    padded = lay_out(EXAMPLES, "padded", pad_token_id=0)
    assert row_lengths(padded)[:, 0].tolist() == [5, 4, 7, 2]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_the_noise_fills_its_bounds_and_only_while_training(tiny_llama, layout):
    model = tiny_llama().train()
    batch, embed = lay_out(EXAMPLES, layout, pad_token_id=0), model.get_input_embeddings()
    clean, alpha = embed(batch.input_ids), 5.0
    most = alpha / (row_lengths(batch).unsqueeze(-1) * clean.shape[-1]).sqrt()
    draws = []
    for _ in range(200):
        with noisy_embeddings(model, batch, alpha):
            draws.append((embed(batch.input_ids) - clean) / most)
    size = torch.stack(draws).abs().flatten(0, 0).amax((0, -1))
    assert (size <= 1 + 1e-4).all() and (size > 0.99).all()
    assert torch.equal(embed(batch.input_ids), clean)
    for quiet in (None, 0.0):
        with noisy_embeddings(model, batch, quiet):
            assert torch.equal(embed(batch.input_ids), clean)
    with noisy_embeddings(model.eval(), batch, alpha):
        assert torch.equal(embed(batch.input_ids), clean)


def largest_noise(trainer) -> float:
    """The largest difference in any forward of a run between the embeddings and what the first layer gets."""
    clean, noisy, model = [], [], trainer.model
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: clean.append(output.detach()))
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: noisy.append(inputs[0].detach()))
    trainer.train()
    return max((a - b).abs().max().item() for a, b in zip(clean, noisy, strict=True))


def test_rows_beside_it_do_not_change_a_trainer_s_noise(make_trainer, tiny_llama, pairs):
    """transformers' own hook divides by the length of the whole packed row."""
    alone, together = (
        largest_noise(
            make_trainer(tiny_llama(), rows, neftune_noise_alpha=5.0, per_device_train_batch_size=8, learning_rate=0.0)
        )
        for rows in (pairs[:1], pairs)
    )
    assert together > 0.9 * alone > 0
