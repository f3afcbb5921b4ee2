"""The methods of probes by the names of the enum ProbeMethod, in lower case without its prefix."""

from collections.abc import Mapping

from patchclamp_server.analysis.probes import logistic, prototype, ridge
from patchclamp_server.analysis.probes.method import Method
from patchclamp_server.artifacts.probes import LOGISTIC, PROTOTYPE, RIDGE

METHODS: Mapping[str, Method] = {LOGISTIC: logistic, RIDGE: ridge, PROTOTYPE: prototype}
