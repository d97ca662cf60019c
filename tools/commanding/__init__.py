# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What every command needs: the environment, and settings that are judged before any work is done."""
