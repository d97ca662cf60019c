# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
collect_ignore = ["torchvision_standin"]  # a package of another environment
