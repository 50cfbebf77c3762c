"""Strict typed configuration: plain mappings (YAML, JSON, command line) to dataclasses and back."""

from ldm.config.kinds import add_kind as add_kind
from ldm.config.typed import from_dict as from_dict
from ldm.config.typed import load_yaml as load_yaml
from ldm.config.typed import override as override
from ldm.config.typed import to_dict as to_dict
from ldm.config.yaml_files import load_mapping as load_mapping
