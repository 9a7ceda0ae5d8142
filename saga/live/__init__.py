"""A saga while it is alive: what forward, backward and its keeper have in hand.

They share the `saga` itself: its ledger (`journal`), its input (`inputs`), the code of its stages (`actions`), the sagas that these run
(`children`). Forward starts the stages (`scheduling`) with what is `around` them, each in its `attempts`; forward and backward ask probes
(`asking`). The keeper has it `held`, and says with a `heart` that it is alive.
"""
