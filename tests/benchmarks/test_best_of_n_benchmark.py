import numpy as np
import torch

from benchmarks.best_of_n import SINGLE, against, draw, proxies, results

PROMPTS, SAMPLES = 6, 8
TEXTS = [f"prompt {i}" for i in range(PROMPTS)]


def scores(seed=0):
    """Gold of 48 pictures, and a CLIP, an aesthetic and three members that see gold through noise."""
    generator = torch.Generator().manual_seed(seed)
    gold = (torch.rand(PROMPTS * SAMPLES, generator=generator) > 0.6).double()
    noisy = [gold + torch.randn(len(gold), generator=generator) for _ in range(5)]
    return gold, noisy[0], noisy[1], torch.stack(noisy[2:])


def test_every_proxy_has_a_score_for_every_picture_and_one_that_is_gold_finds_it(tmp_path):
    gold, clip, aesthetic, members = scores()
    chosen = proxies(clip, aesthetic, members, SAMPLES)
    assert len(chosen) == 9
    assert all(values.shape == (PROMPTS, SAMPLES) for values in chosen.values())
    rows = gold.view(-1, SAMPLES).numpy()
    found = results(chosen | {"gold": rows}, rows, TEXTS)
    assert np.isclose(found["gold"]["judge"][0], rows.mean())
    assert np.isclose(found["gold"]["judge"][-1], rows.max(1).mean())
    assert found["gold"]["peak_n"] == SAMPLES
    draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_members_of_different_scale_count_alike():
    _, clip, aesthetic, members = scores()
    scaled = members * torch.tensor([1.0, 100.0, 0.01])[:, None]
    plain, other = (proxies(clip, aesthetic, m, SAMPLES) for m in (members, scaled))
    assert all(np.allclose(plain[name], other[name]) for name in plain)


def test_differences_are_paired_with_the_single_proxy():
    gold, clip, aesthetic, members = scores()
    chosen = proxies(clip, aesthetic, members, SAMPLES)
    rows = gold.view(-1, SAMPLES).numpy()
    found = against(chosen, rows, TEXTS, SINGLE)
    assert found[SINGLE]["difference"] == 0
    assert np.isclose(found["CLIP"]["tuned"] - found["CLIP"]["base"], found["CLIP"]["difference"])
