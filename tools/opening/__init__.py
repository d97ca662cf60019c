# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The door in front of the bundles: their configs run by verbs, their settings as options, and the same from Python."""
