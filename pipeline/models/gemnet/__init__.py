"""GemNet-OC (arXiv:2204.02782) as the released OCP checkpoints compute it.

``options`` sizes and graphs, ``slots`` and ``tables`` index arithmetic, ``geometry``
angles, ``bases`` shared projections, ``interactions`` and ``quadruplets`` message
passing, ``blocks`` its order, ``model`` the whole network.
"""
