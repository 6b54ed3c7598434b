"""internvl_megatron: train InternVL3 with 3D parallelism on Megatron Core. Importing this package imports no torch."""

__version__ = "0.1.0"
