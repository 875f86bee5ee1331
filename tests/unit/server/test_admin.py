"""Models, tokens, health, counters, the OpenAPI document."""

from __future__ import annotations

import json

from prometheus_client.parser import text_string_to_metric_families

from saddle.config import ServerConfig
from saddle.parsing.tokenizer import Tokenizer
from saddle.protocol import EngineStats
from saddle.version import VERSION
from tests.unit.server.harness import NAME, running, words

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


async def test_models(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, text = await server.get("/v1/models")
        _, one = await server.get("/v1/models/alias")
        status, _ = await server.get("/v1/models/other")
    body = json.loads(text)
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == [NAME, "alias"]
    assert {model["max_model_len"] for model in body["data"]} == {512}
    assert json.loads(one)["id"] == "alias"
    assert status == 404


async def test_small_routes(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        assert json.loads((await server.get("/version"))[1]) == {"version": VERSION}
        assert json.loads((await server.get("/load"))[1]) == {"server_load": 0}
        assert (await server.get("/ping"))[0] == 200
        async with server.http.post(server.base + "/ping") as reply:
            assert reply.status == 200
        async with server.http.head(server.base + "/") as reply:
            assert reply.status == 200
        assert "/v1/chat/completions" in (await server.get("/"))[1]


async def test_tokenize_and_back(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        _, text = await server.post("/tokenize", {"prompt": "Grüße, 世界", "return_token_strs": True})
        _, back = await server.post("/detokenize", {"tokens": text["tokens"]})
        _, chat = await server.post("/tokenize", HI)
        await server.post(CHAT, HI)
        (request,) = server.client.requests
    assert text["tokens"] == tokenizer.encode("Grüße, 世界")
    assert (text["count"], text["max_model_len"]) == (len(text["tokens"]), 512)
    assert len(text["token_strs"]) == text["count"]
    assert back == {"prompt": "Grüße, 世界"}
    assert chat["tokens"] == request.prompt_ids, "the same rendering as for generation"
    assert chat["token_strs"] is None


async def test_tokens_are_those_of_the_servers_own_template_variables(tokenizer: Tokenizer) -> None:
    config = ServerConfig(host="127.0.0.1", port=0, access_log=False,
                          default_chat_template_kwargs={"model_identity": "You are a lamp."})  # fmt: skip
    async with running(tokenizer, words(tokenizer, "x"), config) as server:
        _, chat = await server.post("/tokenize", HI)
        _, other = await server.post("/tokenize", {**HI, "chat_template_kwargs": {"model_identity": "A tree."}})
        await server.post(CHAT, HI)
        (request,) = server.client.requests
    assert "You are a lamp." in tokenizer.decode(chat["tokens"])
    assert "A tree." in tokenizer.decode(other["tokens"])
    assert chat["tokens"] == request.prompt_ids


async def test_metrics_after_a_request(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "a", "bc", "d")) as server:
        server.client.stats = EngineStats(num_blocks=64, num_free_blocks=30, num_cached_blocks=10, num_running=3,
                                          num_waiting=2, num_cache_queries=100, num_cache_hits=40)  # fmt: skip
        _, reply = await server.post(CHAT, {**HI, "max_tokens": 50})
        status, page = await server.get("/metrics")
    assert status == 200
    samples = {
        (sample.name, sample.labels.get("le", sample.labels.get("finished_reason", sample.labels.get("state", "")))):
        sample.value
        for family in text_string_to_metric_families(page) for sample in family.samples
    }  # fmt: skip
    made, prompt = reply["usage"]["completion_tokens"], reply["usage"]["prompt_tokens"]
    assert samples["saddle:num_requests_running", ""] == 3
    assert samples["saddle:num_requests_waiting", ""] == 2
    assert samples["saddle:kv_cache_usage_perc", ""] == 24 / 64
    assert samples["saddle:kv_cache_blocks", "free"] == 30
    assert samples["saddle:prefix_cache_queries_total", ""] == 100
    assert samples["saddle:prefix_cache_hits_total", ""] == 40
    assert samples["saddle:request_success_total", "stop"] == 1
    assert samples["saddle:time_to_first_token_seconds_count", ""] == 1
    assert samples["saddle:inter_token_latency_seconds_count", ""] == made - len(tokenizer.encode("a"))
    assert samples["saddle:request_generation_tokens_sum", ""] == made
    assert samples["saddle:request_prompt_tokens_sum", ""] == prompt
    assert samples["saddle:request_prefill_kv_computed_tokens_sum", ""] == prompt - 4
    assert samples["saddle:prompt_tokens_cached_total", ""] == 4
    assert samples["saddle:request_params_max_tokens_sum", ""] == 50
    assert samples["saddle:request_queue_time_seconds_sum", ""] == 0.001
    assert samples["saddle:request_prefill_time_seconds_sum", ""] == 0.002
    assert samples["saddle:e2e_request_latency_seconds_bucket", "+Inf"] == 1
    assert any(name.startswith("process_") for name, _ in samples)


async def test_every_route_is_documented(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, words(tokenizer, "x")) as server:
        status, text = await server.get("/openapi.json")
    document = json.loads(text)
    assert status == 200
    schema = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "temperature", "tools", "stream_options"} <= set(schema["properties"])
    assert "$ref" not in json.dumps(schema)
    routes = {"/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/metrics"}
    assert routes <= set(document["paths"])
