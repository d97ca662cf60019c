# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The build backend: what pip calls to make the wheel and the editable installation."""
