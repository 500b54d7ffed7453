"""The Triton kernels, installed as ``fused_adamp.kernels``.

``momentum``, ``cosine`` and ``projection`` are the algorithm, in the words of docs/architecture.md, "The numbers".
``precision`` stores bfloat16 without loss, ``tiles`` finds a tile's elements in memory, ``stages`` applies the
algorithm to one tile, and ``plans`` holds the kernels that are launched: a stage each (split), or all of them in one
launch (one pass).
"""
