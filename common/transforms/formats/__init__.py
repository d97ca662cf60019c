# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
