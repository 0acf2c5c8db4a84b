"""Prompts that cover what a model can be asked for.

The first room: a taxonomy of sounds, a tagger and a grammar over it, coverage of both its grid and
an encoder's space, and the greedy choice that raises them.
"""

from ptq4adm.prompts.augment import augment_prompts
from ptq4adm.prompts.coverage import Coverage, measure
from ptq4adm.prompts.domain import Domain, find_domain
from ptq4adm.prompts.encoders import PipelineEncoder, SentenceEncoder, TextEncoder
from ptq4adm.prompts.generator import GrammarGenerator, PromptGenerator
from ptq4adm.prompts.grammar import Forms, Request
from ptq4adm.prompts.result import Augmentation, AugmentSettings, CurvePoint
from ptq4adm.prompts.taxonomy import Action, Aspect, Source, Taxonomy, Words

__all__ = [
    "Action",
    "Aspect",
    "AugmentSettings",
    "Augmentation",
    "Coverage",
    "CurvePoint",
    "Domain",
    "Forms",
    "GrammarGenerator",
    "PipelineEncoder",
    "PromptGenerator",
    "Request",
    "SentenceEncoder",
    "Source",
    "Taxonomy",
    "TextEncoder",
    "Words",
    "augment_prompts",
    "find_domain",
    "measure",
]
