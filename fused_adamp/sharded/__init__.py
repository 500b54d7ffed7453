"""Parameters of which several ranks have a part each: DTensors, and slices of flat buffers.

=================  =================================================================================================
``layout.py``      how a parameter lies on the ranks
``dtensor.py``     the layout of a DTensor
``flat_slice.py``  the layout of a slice of a flat buffer, and what is refused of flat buffers
``placement.py``   which of these a parameter has
``header.py``      what the ranks tell each other besides sums
``exchange.py``    the collectives of a step
``agreement.py``   the ranks make sure that they do the same, and add up what they have measured
``step.py``        the ranks decide together
=================  =================================================================================================
"""
