"""What the tests of this folder share."""

from patchclamp_server.engine.prompt import PromptEncoder
from patchclamp_server.engine.text import token_bytes
from patchclamp_server.heads.needle_prompt import PromptWriter
from patchclamp_server.heads.needles import NeedleTest, plan
from patchclamp_server.model.load import LoadedModel


def writer(model: LoadedModel, test: NeedleTest) -> PromptWriter:
    encoder = PromptEncoder(model.tokenizer, model.info)
    return PromptWriter(plan(test, model.info), model.info, encoder, token_bytes(model.tokenizer))
