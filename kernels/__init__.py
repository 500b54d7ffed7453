"""The Triton kernels, installed as ``fused_adamp.kernels``.

``update.py`` moves weights. ``momentum``, ``cosine`` and ``projection`` are the algorithm that it applies, in the words
of docs/architecture.md, "The numbers". ``plans`` has the kernels that are launched: a stage each (split), or all stages
in one launch (one pass). A stage works on a run of one parameter's tiles:

    prepare  step counts, seeds, and what depends on them, for a block of parameters
    measure  per row p.g, g.g and p.p; whose run is a parameter's last concludes            reads p g
    square   g.g, where only the norm of the gradients is asked for                         reads g
    share    what measure, square and dot find, as far as the ranks ask it of each other    reads p g m v at most
    dot      p.u and p.p, where the decided view is wider than a tile; most often nothing   reads p g m v
    update   momentum, projection, weight decay, weight                                     reads p g m v, writes p m v
    redo     most often nothing: what the others have left, since its squares leave float32

``tables`` numbers the columns of all tables. ``tiles`` finds a tile's elements in memory. ``elements`` loads, rounds
and stores a block of them. ``precision`` stores bfloat16 without loss. ``sums`` adds up what measure, square and share
ask for. ``decision`` says what all tiles of a parameter have in common. ``order`` lets one program wait for another.
``marks`` notes which sums have left float32.

``memory`` and ``work`` are tuples of tables, to be passed on whole: where a parameter's tensors lie, and what the
stages tell each other. Sums run in the math's dtype within a tile and in float64 from tile to tile, always in the
order of the tiles, so that results repeat bit for bit.

Measure and square read gradients as they are; the other stages multiply them by the step's scale. So a tensor that was
measured for the norm of the gradients need not be measured again once the scale that clips them is known. With SHARE,
gradients are scaled before they are summed.

Sums of squares may leave float32: those of gradients or weights of 1e20. A stage that meets such sums writes the epoch
into a mark, and what it cannot decide or step, it leaves as it is. A mark is read once all who may write it are done.
Measure and dot mark a parameter, each with a mark of its own: nothing of it has moved by then, and nothing will. Update
marks a tile that is a view, or whose rows are: it alone has not moved. At the end, redo does what is marked, with the
same functions: there, S.number is float64.
"""
