"""Neighborhood masks against the definition of arXiv 2504.16922, token by token, and against NATTEN's formulae."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.masks import neighborhood_predicate
from dit_sparse.types import TokenGrid


def window_of(i, length, window, stride, dilation, causal=False):
    """The coordinates that coordinate `i` of an axis sees, by the definition's words."""
    group = [c for c in range(length) if c % dilation == i % dilation]
    place = group.index(i)
    stride_group = list(range(place - place % stride, place - place % stride + stride))
    leader = stride_group[-1] if causal else stride_group[len(stride_group) // 2]
    if leader >= len(group):
        leader = len(group) - 1
    if causal:
        window_places = [p for p in range(leader - window + 1, leader + 1) if 0 <= p <= place]
        return {group[p] for p in window_places}
    window_places = list(range(leader - window // 2, leader - window // 2 + window))
    while window_places[0] < 0:
        window_places = [p + 1 for p in window_places]
    while window_places[-1] >= len(group):
        window_places = [p - 1 for p in window_places]
    return {group[p] for p in window_places}


def mask_by_loops(grid, window, stride, dilation, causal=(False, False, False)):
    """`[N, N]` bool, token by token; an axis of one token takes no part."""
    video = {}
    token = grid.video_start
    for f in range(grid.frames):
        for h in range(grid.height):
            for w in range(grid.width):
                video[token] = (f, h, w)
                token += 1
    mask = torch.zeros(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    for q in range(grid.num_tokens):
        seen = None
        if q in video:
            seen = [
                {0} if length == 1 else window_of(video[q][a], length, window[a], stride[a], dilation[a], causal[a])
                for a, length in enumerate(grid.shape)
            ]
        for k in range(grid.num_tokens):
            if seen is None or k not in video:
                mask[q, k] = True
            else:
                mask[q, k] = all(video[k][a] in seen[a] for a in range(3))
    return mask


@st.composite
def settings_of_a_neighborhood(draw):
    shape = tuple(draw(st.integers(1, top)) for top in (4, 6, 7))
    dilation = tuple(draw(st.integers(1, min(3, length))) for length in shape)
    window = tuple(draw(st.integers(1, length // d)) for length, d in zip(shape, dilation, strict=True))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    causal = tuple(draw(st.booleans()) for _ in range(3))
    grid = TokenGrid(*shape, text_len=draw(st.integers(0, 5)), text_first=draw(st.booleans()))
    return grid, window, stride, dilation, causal


def predicate_on_all_tokens(predicate, tokens):
    zero = torch.zeros((), dtype=torch.int64)
    return predicate(zero, zero, torch.arange(tokens)[:, None], torch.arange(tokens)[None, :])


@settings(max_examples=150, deadline=None)
@given(settings_of_a_neighborhood())
def test_the_predicate_is_the_definition(setting):
    grid, *rest = setting
    got = predicate_on_all_tokens(neighborhood_predicate(*setting), grid.num_tokens)
    assert torch.equal(got, mask_by_loops(grid, *rest))


def natten_axis(length, window, stride, dilation, causal):
    """`[L, L]` bool of one axis by the formulae of NATTEN's reference kernel, coordinate by coordinate.

    A token is its place in its dilation group and the group's number; the group's length is the axis' share rounded up
    or down; a window has `window / 2` places to the left and the rest to the right of its leader, and a start that is
    corrected where either end leaves the group.
    """
    left, right = window // 2, window // 2 + window % 2 - 1
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        place, group = divmod(query, dilation)
        size = length // dilation + (1 if group < length % dilation else 0)
        leader = min((place // stride) * stride + (stride - 1 if causal else stride // 2), size - 1)
        if causal:
            start, end = max(leader - left - right, 0), min(place + 1, size)
        else:
            start = max(leader - left, 0) + (size - right - leader - 1 if leader + right >= size else 0)
            end = start + window
        for key in range(length):
            key_place, key_group = divmod(key, dilation)
            mask[query, key] = key_group == group and start <= key_place < end
    return mask


def test_it_agrees_with_nattens_formulae_on_a_thousand_settings():
    """Layouts of one to three axes, any window, stride, dilation and causality that NATTEN accepts."""
    draw = random.Random(0)
    seen = set()
    while len(seen) < 1000:
        shape = [draw.randint(2, top) for top in draw.choice([(16,), (9, 11), (5, 6, 7)])]
        dilation = [draw.randint(1, length) if draw.random() < 0.5 else 1 for length in shape]
        window = [draw.randint(1, length // d) for length, d in zip(shape, dilation, strict=True)]
        stride = [draw.randint(1, w) for w in window]
        causal = [draw.random() < 0.4 for _ in shape]
        axes = list(zip(shape, window, stride, dilation, causal, strict=True))
        seen.add(tuple(axes))
        want = torch.ones(1, 1, dtype=torch.bool)
        for axis in axes:
            want = torch.kron(want, natten_axis(*axis))
        one = [1] * (3 - len(shape))
        predicate = neighborhood_predicate(
            TokenGrid(*one, *shape),
            (*one, *window),
            (*one, *stride),
            (*one, *dilation),
            (*map(bool, [False] * len(one)), *causal),
        )
        assert torch.equal(predicate_on_all_tokens(predicate, want.shape[0]), want), axes


@settings(max_examples=60, deadline=None)
@given(settings_of_a_neighborhood())
def test_windows_never_shrink_unless_causal(setting):
    grid, window, stride, dilation, _ = setting
    predicate = neighborhood_predicate(grid, window, stride, dilation)
    seen = predicate_on_all_tokens(predicate, grid.num_tokens).sum(-1)
    video = seen[grid.video_start : grid.video_start + grid.video_len]
    assert (video == window[0] * window[1] * window[2] + grid.text_len).all()


@settings(max_examples=60, deadline=None)
@given(settings_of_a_neighborhood())
def test_on_causal_axes_a_query_sees_itself_and_nothing_later(setting):
    grid, window, stride, dilation, _ = setting
    predicate = neighborhood_predicate(grid, window, stride, dilation, causal=True)
    seen = predicate_on_all_tokens(predicate, grid.num_tokens)
    video = seen[grid.video_start :, grid.video_start :][: grid.video_len, : grid.video_len]
    assert video.diagonal().all()
    assert not video.triu(1).any()


def test_an_axis_of_one_token_takes_no_part():
    """So one setting fits a video and an image, and two-dimensional layouts are grids of one frame."""
    grid = TokenGrid(1, 6, 6)
    assert neighborhood_predicate(grid, 4, stride=2, causal=True) == neighborhood_predicate(
        grid, (1, 4, 4), stride=(1, 2, 2), causal=(False, True, True)
    )


def test_predicates_compare_by_their_settings():
    grid = TokenGrid(4, 6, 6)
    assert neighborhood_predicate(grid, 3) == neighborhood_predicate(grid, (3, 3, 3), 1, (1, 1, 1))
    assert hash(neighborhood_predicate(grid, 3)) == hash(neighborhood_predicate(grid, [3, 3, 3]))
    assert neighborhood_predicate(grid, 3) != neighborhood_predicate(grid, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (3, 7, 3)}, r"window \* dilation along height must be at most the grid's 6, got 7 \* 1 = 7"),
        ({"window": 2, "dilation": (1, 1, 4)}, r"along width must be at most the grid's 6, got 2 \* 4 = 8.*at most 1"),
        ({"window": 1, "dilation": (5, 1, 1)}, "dilation along frames must be at most the grid's 4, got 5"),
        ({"window": 2, "stride": (1, 3, 1)}, "stride along height must be at most the window's 2, got 3"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"window": (1, 2)}, "window must be a whole number of at least 1"),
        ({"window": (1, 2.5, 3)}, "window must be a whole number"),
        ({"window": 2, "stride": True}, "stride must be a whole number"),
        ({"window": 2, "causal": 1}, "causal must be true or false, or three of them"),
        ({"window": 2, "causal": (True, False)}, "causal must be true or false, or three of them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        neighborhood_predicate(TokenGrid(4, 6, 6), **arguments)
