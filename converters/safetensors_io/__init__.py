"""safetensors files without torch: strict reading of byte ranges, atomic writing in any order."""

from megabatch.converters.safetensors_io.folder import HfFolder, TensorBytes
from megabatch.converters.safetensors_io.sharding import ShardFile, parse_size, split_shards, write_index
from megabatch.converters.safetensors_io.writer import Writer

__all__ = ["HfFolder", "ShardFile", "TensorBytes", "Writer", "parse_size", "split_shards", "write_index"]
