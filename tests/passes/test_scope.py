from collections.abc import Callable

import pytest
from torch import Tensor, fx, nn

from prequant.passes import QuantizeWeights, Scope, ScopeError, SplitOutliers, weight_sites
from prequant.passes.lower import Lower
from prequant.passes.scope import Pattern
from prequant.trace import trace

from ..models import traced
from .support import mlp_inputs, tiny_embedding_program, tiny_mlp_program

BERT = "bert-masked-lm"


def chosen(name: str, include: tuple[Pattern, ...] = (), exclude: tuple[Pattern, ...] = ()) -> list[str]:
    """Names of the weights of a family that a scope leaves in."""
    inside, outside = Scope(include, exclude).split(weight_sites(traced(name)))
    every = [site.name for site in weight_sites(traced(name))]
    assert sorted(site.name for site in (*inside, *outside)) == sorted(every)
    return [site.name for site in inside]


def layers(*parts: str) -> list[str]:
    return [f"bert.encoder.layer.{layer}.{part}.weight" for layer in (0, 1) for part in parts]


SELF = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("bert.encoder.layer.1.output.dense.weight", ["bert.encoder.layer.1.output.dense.weight"]),
        ("bert.encoder.layer.1.output.dense", ["bert.encoder.layer.1.output.dense.weight"]),
        ("*.layer.0.attention.*", layers(*SELF, "attention.output.dense")[:4]),
        ("*.query", layers("attention.self.query")),
        ("*quer[xy]", layers("attention.self.query")),
        (WORDS, [WORDS]),
        ("cls.predictions.decoder.weight", [WORDS]),  # its other name
        ("cls.predictions.decoder", [WORDS]),  # also the path of the module that uses it
        ("cls.*", [WORDS, "cls.predictions.transform.dense.weight"]),
        ("type:BertSelfAttention", layers(*SELF)),
        ("type:BertSelf*", layers(*SELF, "attention.output.dense")),
        (
            "type:Embedding",
            [WORDS, *(f"bert.embeddings.{kind}_embeddings.weight" for kind in ("token_type", "position"))],
        ),
    ],
)
def test_patterns(pattern: str, names: list[str]) -> None:
    assert sorted(chosen(BERT, (pattern,))) == sorted(names)
    everything = {site.name for site in weight_sites(traced(BERT))}
    assert set(chosen(BERT, exclude=(pattern,))) == everything - set(names)


def test_any_include_and_no_exclude() -> None:
    assert sorted(chosen(BERT, ("*.query", "*.key"), ("*.layer.0.*",))) == sorted(layers(*SELF[:2])[2:])
    assert chosen(BERT, ("*",), ("*",)) == []


def test_nothing_said_is_everything() -> None:
    assert chosen(BERT) == [site.name for site in weight_sites(traced(BERT))]
    assert Scope().split(list[fx.Node]()) == ([], [])


def test_a_predicate_sees_the_nodes_that_use_a_weight() -> None:
    seen = []

    def first_linear(node: fx.Node) -> bool:
        seen.append(node)
        return node.name == "linear"

    program = tiny_embedding_program()
    inside, _ = Scope((first_linear,)).split(weight_sites(program))
    assert [site.name for site in inside] == ["mix.weight"]
    assert {node.name for node in seen} == {"embedding", "linear", "linear_1"}


def test_a_weight_is_in_scope_if_any_of_its_uses_is() -> None:
    program = tiny_embedding_program()
    for pattern in ("type:Embedding", "head", "tokens", "head.weight"):
        inside, _ = Scope((pattern,)).split(weight_sites(program))
        assert [site.name for site in inside] == ["tokens.weight"], pattern


def test_a_weight_goes_by_its_own_name_and_by_the_module_that_uses_it() -> None:
    class User(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return nn.functional.linear(x, weight)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.store, self.plain, self.user = nn.Linear(8, 8), nn.Linear(8, 8), User()

        def forward(self, x: Tensor) -> Tensor:
            return self.user(self.plain(x), self.store.weight)

    sites = weight_sites(trace(Model().eval(), mlp_inputs()))
    for pattern in ("store.weight", "store", "user", "type:User"):
        assert [site.name for site in Scope((pattern,)).split(sites)[0]] == ["store.weight"], pattern


def test_nodes_go_by_their_name_and_module() -> None:
    nodes = [node for node in tiny_mlp_program().graph.nodes if node.op == "call_function"]

    def names(*include: Pattern) -> list[str]:
        return [node.name for node in Scope(include).split(nodes)[0]]

    assert names("relu") == ["relu"]
    assert names("second") == ["linear_1"]
    assert names("linear*") == ["linear", "linear_1"]
    assert names("type:Dropout") == ["dropout"]
    assert names(lambda node: len(node.args) == 1) == ["relu"]


# ---- patterns that match nothing


def nowhere(node: fx.Node) -> bool:
    return False


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.atention.self.query", "near misses: bert.encoder.layer.0.attention.self.query, bert.encoder.layer.1."),
        ("*.querry", "near misses: bert.encoder.layer.0.attention.self.query, bert.encoder.layer.1."),
        ("*.attention.querry", "near misses: bert.encoder.layer.0.attention.self.query, bert.encoder.layer.1."),
        ("*embeding*", "near misses: bert.embeddings.word_embeddings, "),
        ("cls.predictions.decodr", "near misses: cls.predictions.decoder"),
        ("bert.encoder.layer.7.output.dense", "bert.encoder.layer.1.output.dense, "),
        ("type:BertSelfAtention", "near misses: type:BertSelfAttention, "),
        ("type:linear", "near misses: type:Linear"),
        ("zzz", "there are, among others: bert.embeddings."),
        (nowhere, "the predicate 'nowhere' matches none of the 16 candidates"),
    ],
)
@pytest.mark.parametrize("where", ["include", "exclude"])
def test_near_misses(where: str, pattern: Pattern, near: str) -> None:
    with pytest.raises(ScopeError, match="matches none of the 16 candidates") as raised:
        chosen(BERT, **{where: ("*.query", pattern)})
    assert near in str(raised.value)
    assert callable(pattern) or repr(pattern) in str(raised.value)


def test_case_counts() -> None:
    with pytest.raises(ScopeError):
        chosen(BERT, ("*.Query",))


@pytest.mark.parametrize(
    "make", [lambda **o: QuantizeWeights(**o), lambda **o: SplitOutliers(ratio=0.1, **o), lambda **o: Lower(**o)]
)
def test_every_pass_says_it_the_same_way(make: Callable[..., QuantizeWeights]) -> None:
    pass_ = make(include="first", exclude=["type:Embedding*"])
    assert pass_.include == ("first",) and pass_.exclude == ("type:Embedding*",)
    with pytest.raises(Exception, match=r"'type:Embedding\*' matches none of the 2 candidates.*type:Linear"):
        pass_(tiny_mlp_program())
    report = make(include="first")(tiny_mlp_program()).reports[-1]
    assert ("second.weight", "out of scope") in [(kept.what, kept.why) for kept in report.kept]
