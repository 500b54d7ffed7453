"""The Triton kernels, installed as ``fused_adamp.kernels``.

``update.py`` moves weights. ``momentum``, ``cosine`` and ``projection`` are the algorithm that it applies, in the words
of docs/architecture.md, "The numbers". ``plans`` has the kernels that are launched: a stage each (split), or all stages
in one launch (one pass). A stage works on a run of one parameter's tiles:

    prepare  step counts, seeds, and what depends on them, for a block of parameters
    measure  per row p.g, g.g and p.p; the last run of a parameter concludes                reads p g
    square   g.g, for the norm of the gradients alone                                       reads g
    share    the sums of measure, square and dot that ranks ask of each other               reads p g m v at most
    dot      p.u and p.p, if the decided view is wider than a tile; mostly nothing          reads p g m v
    update   momentum, projection, weight decay, weight                                     reads p g m v, writes p m v
    redo     parameters and tiles that the others have marked; mostly nothing

``tables`` numbers the columns of all tables. ``tiles`` finds a tile's elements in memory. ``elements`` loads, rounds
and stores a block of elements. ``precision`` rounds to bfloat16, with or without a remainder. ``sums`` has the sums of
measure, square and share. ``decision`` looks up the decision and other properties of a parameter. ``order`` lets one
program wait for another. ``marks`` marks sums that have left float32's range.

Functions share these arguments. ``memory`` and ``work`` are tuples of tables (``plans.py``): the addresses of tensors,
and the results that stages pass to each other. ``x`` is a parameter's index, ``tile`` a tile's. ``where`` is a tile's
place, from :func:`~.tiles.locate`. ``e`` is a block of element numbers within a tile; ``mask`` says which exist. ``S``
is the :class:`~.tiles.Spec` of the kernel; ``S.number`` is the dtype of the math. ``epoch`` numbers steps.

Sums are in ``S.number`` within a tile and in float64 over tiles, always in the order of the tiles, so that results
repeat bit for bit.

Measure and square read gradients as they are; the other stages multiply them by the step's scale. So a tensor that was
measured for the norm of the gradients need not be measured again once the scale that clips them is known. With SHARE,
gradients are scaled before they are summed.

Sums of squares may leave float32's range, e.g. for gradients or weights of 1e20. A stage that finds such sums writes
the epoch into a mark and leaves the parameter or the tile unchanged. A mark is read when all programs that may write it
are done. Measure and dot mark a parameter, each with a mark of its own: then no later stage moves it. Update marks a
tile if the tile or its rows are views: then only this tile has not moved. At the end, redo steps marked parameters and
tiles with the same functions, where S.number is float64.
"""
