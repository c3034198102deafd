"""The configuration of a run: frozen sections with documented fields, read from YAML, overridden by flags.

YAML and command line build the same objects; an unknown key or a wrong value is refused with the place,
the cause and the nearest right name. A list of names may also be written as one text with commas.
"""

from gradpursuit.config.data import ColumnName, DataSection, SourceSection, Turns
from gradpursuit.config.loading import build_config, build_section, load_config
from gradpursuit.config.sections import (
    EngineSection,
    EvaluationSection,
    GradientsSection,
    LoraSection,
    MatchingSection,
    ModelSection,
    PreconditionerName,
    PursuitSection,
    RunConfig,
    SelectionSection,
    WarmupSection,
)
from gradpursuit.config.values import OWN, Fraction, Number, Section, Whole, rows_of, target_name

__all__ = [
    "OWN",
    "ColumnName",
    "DataSection",
    "EngineSection",
    "EvaluationSection",
    "Fraction",
    "GradientsSection",
    "LoraSection",
    "MatchingSection",
    "ModelSection",
    "Number",
    "PreconditionerName",
    "PursuitSection",
    "RunConfig",
    "Section",
    "SelectionSection",
    "SourceSection",
    "Turns",
    "WarmupSection",
    "Whole",
    "build_config",
    "build_section",
    "load_config",
    "rows_of",
    "target_name",
]
