"""Labelled images behind one small protocol: training, validation, test and calibration parts of a set, by its name.

    data = open_data(DataSettings("fashion-mnist", batch=128), seed=0)
    for inputs, targets in data.train.epoch(3): ...

    digits                       scikit-learn's 1,797 handwritten digits, bundled with it
    fashion-mnist                70,000 articles of clothing, from torchvision's files or Debian's package
    cifar10, cifar100            60,000 small photographs, from the binary or the Python version's files
    imagenet                     a folder with train/ and val/, in which a folder holds a class
    folder:PATH                  the same of your own; or class folders alone, which are then split
    package.module:function      your own: it returns (train, test) datasets of (image, label), or a ``Data``

**What is chosen is chosen on validation.** The validation part is held out of the training images, never of the test
images; pruning ratios, the best epoch and all else that is tuned is tuned on it. The test part is the set's own and is
for the last number only. Which image belongs to which part depends on the set alone, not on the seed: a network that
was trained under one seed has not seen the validation images of another.
"""

from secateur.zoo.data.loaders import Data, Loader
from secateur.zoo.data.opening import open_data
from secateur.zoo.data.settings import NAMES, DataSettings

__all__ = ["NAMES", "Data", "DataSettings", "Loader", "open_data"]
