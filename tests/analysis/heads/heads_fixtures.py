"""What the tests of this folder share."""

from patchclamp_server.analysis.heads.retrieval.needle_prompt import PromptWriter
from patchclamp_server.analysis.heads.retrieval.needles import NeedleTest, plan
from patchclamp_server.model.load import LoadedModel
from patchclamp_server.text.detokenize import token_bytes
from patchclamp_server.text.prompt import PromptEncoder


def writer(model: LoadedModel, test: NeedleTest) -> PromptWriter:
    encoder = PromptEncoder(model.tokenizer, model.info)
    return PromptWriter(plan(test, model.info), model.info, encoder, token_bytes(model.tokenizer))
