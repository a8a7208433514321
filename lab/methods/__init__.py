"""Training methods: each file holds what differs from ERM and nothing else.

A method says what a step follows: with which weights w_g the full batch moves the parameters,
dθ/dt = -Σ w_g ∇R_g, and which loss a mini-batch has. A new method is one file with a subclass of
`lab.methods.erm.ERM` and one record in `lab.config.records`, or a plugin with both.
"""


def build(config, splits):
    """The configured method for these splits. Raises `DataError` if they do not suit it."""
    return config.method.load()(config, splits)
