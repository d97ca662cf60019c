#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# An Enhanced MR image whose frames were derived from several frames of another one, so that ReferencedFrameNumber has
# several values, as its VM of 1-n allows and scanners with XA30 write: highdicom opens it if the number has one value
# and fails inside its database if it has more, though neither pixels nor places depend on it. Most expect it to open.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6 pydicom==3.0.2 highdicom==0.28.2
"$folder/env/bin/python" - <<'PY'
import importlib.metadata

import highdicom
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid


def item(**values):
    one = Dataset()
    for name, value in values.items():
        setattr(one, name, value)
    return one


def derived(numbers):
    """Return an image of four frames, each made from frames of another."""
    image = item(
        SOPClassUID=EnhancedMRImageStorage, SOPInstanceUID=generate_uid(), SeriesInstanceUID=generate_uid(),
        StudyInstanceUID=generate_uid(), FrameOfReferenceUID=generate_uid(), Modality="MR", PatientID="1",
        Rows=4, Columns=4, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16,
        BitsStored=16, HighBit=15, PixelRepresentation=0, NumberOfFrames=4, PixelData=bytes(4 * 4 * 4 * 2),
    )
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=[1, 1], SliceThickness=1)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        )
    ]
    image.PerFrameFunctionalGroupsSequence = []
    for z in range(4):
        source = item(ReferencedSOPClassUID=EnhancedMRImageStorage, ReferencedSOPInstanceUID=generate_uid())
        source.ReferencedFrameNumber = numbers
        image.PerFrameFunctionalGroupsSequence.append(
            item(
                PlanePositionSequence=[item(ImagePositionPatient=[0, 0, z])],
                DerivationImageSequence=[item(SourceImageSequence=[source], DerivationCodeSequence=[])],
            )
        )
    return image


print("highdicom", importlib.metadata.version("highdicom"), "pydicom", pydicom.__version__)
volume = highdicom.Image.from_dataset(derived(1)).get_volume()
print("ReferencedFrameNumber 1: a volume of", volume.spatial_shape)
assert volume.spatial_shape == (4, 4, 4)
try:
    highdicom.Image.from_dataset(derived([1, 2, 3]))
except Exception as error:
    print(f"ReferencedFrameNumber 1, 2, 3: {type(error).__name__}: {error}")
else:
    raise SystemExit("highdicom opens it now")
PY
