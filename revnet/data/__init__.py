"""Data modules: real digits that need no download, CIFAR, folders of images such as ImageNet, and synthetic images."""

from revnet.data.augment import cutout, random_crop, random_flip
from revnet.data.cifar import CIFAR10, CIFAR100
from revnet.data.datasets import FileImages, TensorImages
from revnet.data.digits import Digits
from revnet.data.fake import Fake
from revnet.data.image_folder import ImageFolder
from revnet.data.module import ImageDataModule
from revnet.data.normalize import Normalize
from revnet.data.read_image import read_image
from revnet.data.split import stratified_split

__all__ = [
    "Digits",
    "CIFAR10",
    "CIFAR100",
    "ImageFolder",
    "Fake",
    "ImageDataModule",
    "TensorImages",
    "FileImages",
    "Normalize",
    "cutout",
    "random_crop",
    "random_flip",
    "read_image",
    "stratified_split",
]
