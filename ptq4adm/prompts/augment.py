"""The main job of this room: seeds and a budget become prompts that cover a domain.

Our reading of "coverage-driven prompt augmentation" in the abstract of arXiv 2409.13894. The
paper's own algorithm is not public: nothing here is it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ptq4adm.errors import PromptError
from ptq4adm.prompts.checks import CheckedPrompts, check_seeds
from ptq4adm.prompts.choose import Candidates, Greedy
from ptq4adm.prompts.coverage import Grid
from ptq4adm.prompts.domain import GENERAL, Domain, find_domain
from ptq4adm.prompts.duplicates import NearDuplicates, plain_key
from ptq4adm.prompts.encoders import PipelineEncoder, TextEncoder, unit_vectors
from ptq4adm.prompts.generator import GrammarGenerator, PromptGenerator, make_pool
from ptq4adm.prompts.result import Augmentation, AugmentSettings, CurvePoint

logger = logging.getLogger(__name__)


def augment_prompts(
    seeds: Sequence[str] | None = None,
    budget: int = 64,
    *,
    pipe: Any = None,
    domain: str | Domain | None = None,
    encoder: TextEncoder | None = None,
    generator: PromptGenerator | None = None,
    exclude: Sequence[str] = (),
    settings: AugmentSettings | None = None,
) -> Augmentation:
    """Add candidates to seed prompts until they cover what a model can be asked for.

    The same arguments give the same prompts.

    Args:
        seeds: kept, and first; None for the domain's own, of which half the budget is taken if they
            are as many as the budget.
        budget: prompts in the end, seeds included.
        pipe: a pipeline whose text conditioning is to be covered; it also names its domain, if it
            knows it.
        domain: a `Domain` or the name of one; None for the pipeline's, or "general".
        encoder: measures distances instead of the pipeline; without either, the aspect grid alone
            is covered.
        generator: writes the candidates; None for the grammar.
        exclude: prompts kept for evaluation: neither they nor near duplicates of them are used.
        settings: None for the default.

    Returns:
        The prompts, the coverage before and after, and the curve between.

    Raises:
        PromptError: if there is no usable seed, the budget is below their number, or the domain or
            the pipeline cannot be used.
    """
    found = _domain_of(pipe, domain)
    settings = settings or AugmentSettings()
    if encoder is None and pipe is not None:
        encoder = PipelineEncoder(pipe)
    checked = _seeds(seeds, budget, found, exclude, encoder)
    for warning in checked.warnings:
        logger.warning("prompts: %s", warning)
    pool = _pool(found, checked, generator, exclude, settings)
    greedy = Greedy(
        _candidates(found, [*checked.read, *pool], encoder),
        range(len(checked.prompts)),
        grid_weight=settings.grid_weight,
        power=settings.power,
    )
    prompts = [*checked.prompts, *pool]
    curve, stop = _grow(greedy, prompts, len(checked.prompts), budget, settings)
    return Augmentation(
        prompts=tuple(prompts[i] for i in greedy.chosen),
        seeds=len(checked.prompts),
        curve=tuple(curve),
        settings=settings,
        domain=found.name,
        encoder=None if encoder is None else encoder.name,
        generator=GrammarGenerator.name if generator is None else generator.name,
        candidates=len(pool),
        stop=stop,
        warnings=tuple(checked.warnings),
    )


def _domain_of(pipe: Any, domain: str | Domain | None) -> Domain:
    if isinstance(domain, Domain):
        return domain
    return find_domain(domain or getattr(pipe, "prompt_domain", None) or GENERAL)


def _seeds(
    seeds: Sequence[str] | None,
    budget: int,
    domain: Domain,
    exclude: Sequence[str],
    encoder: TextEncoder | None,
) -> CheckedPrompts:
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise PromptError(f"budget: got {budget!r}, needs a whole number of at least 1")
    read = None if encoder is None else encoder.read
    cut = None
    if seeds is None:
        seeds = domain.seeds
        if budget <= len(seeds):
            kept = max(1, budget // 2)
            cut = f"{kept} of the domain's {len(seeds)} seeds are taken, half of the budget"
            seeds = [seeds[i * len(seeds) // kept] for i in range(kept)]
    checked = check_seeds(seeds, domain, exclude=exclude, read=read)
    if cut is not None:
        checked.warnings.append(cut)
    if budget < len(checked.prompts):
        raise PromptError(
            f"budget {budget} is below the {len(checked.prompts)} seeds, which are all kept; raise "
            "it, or give fewer seeds"
        )
    return checked


def _pool(
    domain: Domain,
    checked: CheckedPrompts,
    generator: PromptGenerator | None,
    exclude: Sequence[str],
    settings: AugmentSettings,
) -> list[str]:
    excluded = NearDuplicates(list(exclude))
    seeds = {plain_key(prompt) for prompt in checked.prompts}

    def is_refused(text: str) -> bool:
        return plain_key(text) in seeds or text in excluded

    return make_pool(
        domain, settings.pool, settings.seed, generator=generator, refuse=is_refused
    )  # fmt: skip


def _candidates(domain: Domain, prompts: list[str], encoder: TextEncoder | None) -> Candidates:
    grid = Grid(domain.tagger)
    bits = [grid.bits(domain.tagger.tag(prompt)) for prompt in prompts]
    vectors: torch.Tensor | None = None if encoder is None else unit_vectors(encoder, prompts)
    return Candidates(grid, bits, vectors)


def _grow(
    greedy: Greedy, prompts: list[str], seeds: int, budget: int, settings: AugmentSettings
) -> tuple[list[CurvePoint], str]:
    """Add the best candidate until something says stop: the curve, and what it was."""
    curve = [CurvePoint(0.0, greedy.coverage())]
    known = NearDuplicates(prompts[:seeds])
    best, small = greedy.best_first(), 0
    while len(greedy.chosen) < budget:
        after = curve[-1].coverage
        if settings.target is not None and min(after.cells, after.pairs) >= settings.target:
            return curve, f"the target of {settings.target:g} is reached"
        index, gain = next(((i, g) for i, g in best if prompts[i] not in known), (-1, 0))
        if index < 0:
            return curve, "no candidate is left"
        share = greedy.as_share(gain)
        small = small + 1 if share <= settings.eps else 0
        if small >= settings.patience:
            return curve, f"{small} candidates in a row gain no more than {settings.eps:g}"
        greedy.add(index)
        known.add(prompts[index])
        curve.append(CurvePoint(share, greedy.coverage()))
    return curve, "the budget is spent"
