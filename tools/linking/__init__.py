# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Bundles as folders and zips that run without this repository, for new tasks and on the Hugging Face Hub."""
