"""How the scripts print their --help."""

import argparse


class DefaultsShown(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default but empty ones, whose help says what happens then."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)
