"""Data modules: digits that need no download, CIFAR, folders and shards of images such as ImageNet, synthetic ones."""

from revnet.data.augment import cutout, mixing, random_crop, random_flip
from revnet.data.cifar import CIFAR10, CIFAR100
from revnet.data.datasets import FileImages, ReadableImages, TensorImages
from revnet.data.digits import Digits
from revnet.data.encoded_images import EncodedImages
from revnet.data.fake import Fake
from revnet.data.image_folder import ImageFolder
from revnet.data.mnist import MNIST
from revnet.data.module import ImageDataModule
from revnet.data.normalize import Normalize
from revnet.data.read_image import read_image
from revnet.data.shard_batches import ShardBatches
from revnet.data.shard_index import Shard, ShardIndex
from revnet.data.sharded_images import ShardedImages
from revnet.data.split import stratified_split
from revnet.data.write_shards import write_shards

__all__ = [
    "Digits",
    "MNIST",
    "CIFAR10",
    "CIFAR100",
    "ImageFolder",
    "ShardedImages",
    "Fake",
    "ImageDataModule",
    "EncodedImages",
    "TensorImages",
    "FileImages",
    "ReadableImages",
    "ShardBatches",
    "Shard",
    "ShardIndex",
    "write_shards",
    "Normalize",
    "cutout",
    "random_crop",
    "random_flip",
    "mixing",
    "read_image",
    "stratified_split",
]
