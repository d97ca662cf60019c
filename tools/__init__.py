# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The commands of the collection, one verb each; what they call is in the folders, which import one way only."""
