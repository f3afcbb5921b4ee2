"""Reducers: what a job accumulates of the rows of all its requests, on the device, while the engine runs them.

A `Reduction` of a request (engine/request.py) names a site and a reducer, which all requests of a job share. Each is a
file:

    firing.py          how often every unit fires                 Σ [x_i > θ], Σ [|x_i| > θ]
    firing_by_position.py   the same by part of a text
    moments.py         mean, variance and maximum                 Σ x, Σ x², max x
    top_keys.py        the tokens or pairs with which a unit fires most
    occurrences.py     how often each token and pair comes
    sums.py            count, sum and mean of every unit          n, Σ x, Σ x / n
    ordinary_sums.py   the same without attention sinks
    covariance.py      covariance of all pairs of units           Σ (x - m)(x - m)ᵀ / n
    top_k.py           the k largest values of every unit and where they stand; k = 1 is the maximum
    largest_of_texts.py  the k texts with the largest values of every unit, each with its largest alone
    joint_counts.py    how often two units are active together    Σ [x_i > θ][x_j > θ]
    histogram.py       counts between edges, and quantiles of them
    sample.py          every n-th row of each text
    beginnings.py      the first rows of the first texts
    kept_rows.py       all rows of one text
    largest_rows.py    the largest value of every unit in one text, and its row
    per_label.py       one reducer for each label
    chosen_units.py    some units alone, for another reducer
    chosen_tokens.py   some tokens of one text alone, for another reducer

divergence.py is of another kind: it takes the log-probabilities of scored tokens (Request.scores), and compares those
of several requests.

Raw activations do not travel: what comes to the host is the result, when it is asked for. Each says in its docstring
what it computes, the shape of what it keeps and how many bytes that is, however many rows come. Those that are
`Resumable` can be written down between two texts and taken up again (analysis/corpora). On a CPU the passes over rows
are loops that numba compiles (loops.py), of rows that are gathered from several steps (gathered.py).
"""
