# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a run needs of a GPU, estimated without one and measured on one."""
