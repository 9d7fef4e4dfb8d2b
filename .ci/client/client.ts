// Uses each route, with types generated from the OpenAPI document and without casts.

import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { operations, paths } from "./schema.js";

type Responses<Name extends keyof operations> = operations[Name]["responses"];
type Json<Response extends { content: { "application/json": unknown } }> =
  Response["content"]["application/json"];

// Compiles only if each of these errors has a schema, in which detail is a string.
export const getDetail = (
  error:
    | Json<Responses<"register">[400 | 409 | 503]>
    | Json<Responses<"login">[400 | 401 | 429 | 503]>
    | Json<Responses<"me">[401 | 503]>
    | Json<Responses<"refresh">[400 | 401 | 503]>
    | Json<Responses<"logout">[400 | 401 | 503]>,
): string => error.detail;

const client = createClient<paths>({ baseUrl: process.argv[2] });
const body = { email: "alice@example.com", password: "MyS3cret@1" };

const registered = await client.POST("/auth/register", { body });
assert(registered.data);
const userId: string = registered.data.user_id;

const conflict = await client.POST("/auth/register", { body });
assert.equal(conflict.response.status, 409);
// A status does not narrow the type, and the detail of a 422 is a list.
assert(typeof conflict.error?.detail === "string");
const reason: string = conflict.error.detail;
assert.equal(reason, "This email is already registered");

const invalid = await client.POST("/auth/register", { body: { ...body, password: "short" } });
assert.equal(invalid.response.status, 422);
assert(Array.isArray(invalid.error?.detail));
assert.deepEqual(invalid.error.detail[0]?.loc, ["body", "password"]);

const wrong = await client.POST("/auth/login", { body: { ...body, password: "wrong" } });
assert.equal(wrong.response.status, 401);
assert(typeof wrong.error?.detail === "string");
const wrongReason: string = wrong.error.detail;
assert.equal(wrongReason, "Wrong email or password");

const login = await client.POST("/auth/login", { body });
assert(login.data);
const { access_token: accessToken, refresh_token: refreshToken } = login.data;

const me = (token: string) =>
  client.GET("/auth/me", { headers: { Authorization: `Bearer ${token}` } });
const user = await me(accessToken);
assert.deepEqual([user.data?.id, user.data?.email], [userId, body.email]);

// Without a 422, the detail is a string at once.
const unauthorized = await me("x");
assert.equal(unauthorized.response.status, 401);
assert(unauthorized.error);
const tokenReason: string = unauthorized.error.detail;
assert.match(tokenReason, /^The token is invalid/);

const refreshed = await client.POST("/auth/refresh", { body: { refresh_token: refreshToken } });
assert(refreshed.data);
const logout = await client.POST("/auth/logout", {
  body: { refresh_token: refreshed.data.refresh_token },
});
assert.equal(logout.response.status, 204);

const ended = await client.POST("/auth/refresh", {
  body: { refresh_token: refreshed.data.refresh_token },
});
assert.equal(ended.response.status, 401);
assert(typeof ended.error?.detail === "string");
const endedReason: string = ended.error.detail;
assert.equal(endedReason, tokenReason);
