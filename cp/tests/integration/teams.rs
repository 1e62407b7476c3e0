//! Teams and their members.

use crate::stage::{ADMIN, Stage, error, json, text};
use serde_json::json;
use wrenn_cp::db::{Database, teams};
use wrenn_cp::http::handler::Method::{Delete, Get, Patch, Post};

#[test]
fn members_come_act_by_their_role_and_go() {
    let mut stage = Stage::new();
    let owner = stage.person(ADMIN);
    let member = stage.person("member@example.com");
    let auth = ("authorization", owner.as_str());
    let team = text(&json(&stage.request(Get, "/v1/teams", auth, ""))[0]["id"]);
    let members = format!("/v1/teams/{team}/members");

    let stranger = stage.request(Get, &members, ("authorization", &member), "");
    assert_eq!(error(&stranger).0, 403);
    let added = stage.request(Post, &members, auth, r#"{"email":"Member@example.com"}"#);
    assert_eq!((added.status, &json(&added)["role"]), (201, &json!("member")));
    let user_id = text(&json(&added)["user_id"]);
    assert_eq!(stage.request(Post, &members, auth, r#"{"email":"member@example.com"}"#).status, 400);
    assert_eq!(stage.request(Post, &members, auth, r#"{"email":"nobody@example.com"}"#).status, 404);

    let switch = json!({"team_id": team}).to_string();
    let switched = stage.request(Post, "/v1/auth/switch-team", ("authorization", &member), &switch);
    assert_eq!(switched.status, 200);
    let member = format!("Bearer {}", text(&json(&switched)["token"]));
    let as_member = ("authorization", member.as_str());
    assert_eq!(json(&stage.request(Get, &members, as_member, "")).as_array().map(Vec::len), Some(2));
    let rename = format!("/v1/teams/{team}");
    assert_eq!(stage.request(Patch, &rename, as_member, r#"{"name":"Mine"}"#).status, 403);

    let one = format!("{members}/{user_id}");
    assert_eq!(stage.request(Patch, &one, auth, r#"{"role":"owner"}"#).status, 400);
    assert_eq!(stage.request(Patch, &one, auth, r#"{"role":"admin"}"#).status, 204);
    assert_eq!(stage.request(Patch, &rename, as_member, r#"{"name":"Ours now"}"#).status, 204);
    assert_eq!(stage.request(Patch, &rename, as_member, r#"{"name":"<b>"}"#).status, 400);
    let owner_id = text(&json(&stage.request(Get, &members, auth, ""))[0]["user_id"]);
    let the_owner = format!("{members}/{owner_id}");
    assert_eq!(error(&stage.request(Delete, &the_owner, as_member, "")).0, 403);
    let leave = format!("/v1/teams/{team}/leave");
    assert_eq!(stage.request(Post, &leave, auth, "").status, 403, "the owner stays");
    assert_eq!(stage.request(Post, &leave, as_member, "").status, 204);
    assert_eq!(
        stage.request(Get, &members, as_member, "").status,
        401,
        "the token is for a team that was left"
    );
}

#[test]
fn keys_of_those_who_leave_are_revoked_in_that_team_only() {
    let mut stage = Stage::new();
    let owner = stage.person(ADMIN);
    let auth = ("authorization", owner.as_str());
    let owners_key = stage.api_key(&owner);
    let team = text(&json(&stage.request(Get, "/v1/teams", auth, ""))[0]["id"]);
    let members = format!("/v1/teams/{team}/members");
    let at_home = stage.person("member@example.com");
    let home_key = stage.api_key(&at_home);
    let works =
        |stage: &mut Stage, key: &str| stage.request(Get, "/v1/capsules", ("x-api-key", key), "").status;
    for way in ["remove", "leave", "delete"] {
        let added = stage.request(Post, &members, auth, r#"{"email":"member@example.com"}"#);
        assert_eq!(added.status, 201, "{:?}", added.error_message());
        let switch = json!({"team_id": team}).to_string();
        let switched = stage.request(Post, "/v1/auth/switch-team", ("authorization", &at_home), &switch);
        let member = format!("Bearer {}", text(&json(&switched)["token"]));
        let key = stage.api_key(&member);
        assert_eq!((works(&mut stage, &key), works(&mut stage, &home_key)), (200, 200));
        let gone = match way {
            "remove" => {
                let one = format!("{members}/{}", text(&json(&added)["user_id"]));
                stage.request(Delete, &one, auth, "")
            }
            "leave" => {
                stage.request(Post, &format!("/v1/teams/{team}/leave"), ("authorization", &member), "")
            }
            _ => {
                let body = r#"{"confirmation":"member@example.com"}"#;
                stage.request(Delete, "/v1/me", ("authorization", &at_home), body)
            }
        };
        assert_eq!(gone.status, 204, "{way}: {:?}", gone.error_message());
        assert_eq!(works(&mut stage, &key), 401, "{way}");
        assert_eq!(works(&mut stage, &owners_key), 200, "{way}");
        assert_eq!(works(&mut stage, &home_key), if way == "delete" { 401 } else { 200 }, "{way}");
    }
    let told = crate::postgres::client(&stage.url)
        .query(
            "select id from audit_log where action = 'api_key.delete' and team_id = $1
             and metadata ->> 'reason' = 'who made it has left the team'",
            &[&team],
        )
        .expect("query");
    assert_eq!(told.len(), 3);
}

/// A key that is being made when its maker is removed must not outlive that.
#[test]
fn a_member_is_not_removed_while_they_make_a_key() {
    let mut stage = Stage::new();
    let owner = stage.person(ADMIN);
    let team = text(&json(&stage.request(Get, "/v1/teams", ("authorization", &owner), ""))[0]["id"]);
    let members = stage.request(Get, &format!("/v1/teams/{team}/members"), ("authorization", &owner), "");
    let me = text(&json(&members)[0]["user_id"]);
    let url = stage.url.clone();
    let mut db = Database::connect(&url).expect("connect");
    db.transaction(|sql| {
        assert!(teams::hold_member(sql, &team, &me)?);
        assert!(!teams::hold_member(sql, &team, "usr-nobody")?);
        let mut other = crate::postgres::client(&url);
        other.batch_execute("set lock_timeout = '300ms'").expect("set");
        let removed =
            other.execute("delete from team_members where team_id = $1 and user_id = $2", &[&team, &me]);
        let why = removed.expect_err("it waits");
        let why = why.as_db_error().expect("the database says why").message();
        assert!(why.contains("lock timeout"), "{why}");
        Ok(())
    })
    .expect("held");
    assert_eq!(stage.request(Post, "/v1/api-keys", ("authorization", &owner), "{}").status, 201);
}

#[test]
fn teams_are_made_and_people_found() {
    let mut stage = Stage::new();
    let bearer = stage.person(ADMIN);
    let auth = ("authorization", bearer.as_str());
    let made = stage.request(Post, "/v1/teams", auth, r#"{"name":"Second team"}"#);
    assert_eq!((made.status, &json(&made)["role"]), (201, &json!("owner")));
    assert_eq!(text(&json(&made)["slug"]).len(), 13);
    assert_eq!(json(&stage.request(Get, "/v1/teams", auth, "")).as_array().map(Vec::len), Some(2));
    stage.person("under_score@example.com");
    let found = stage.request(Get, "/v1/users/search?email=under_score@", auth, "");
    assert_eq!(json(&found)[0]["email"], "under_score@example.com");
    let none = stage.request(Get, "/v1/users/search?email=underXscore@", auth, "");
    assert_eq!(json(&none), json!([]), "an underscore is no wildcard");
    assert_eq!(stage.request(Get, "/v1/users/search?email=adm", auth, "").status, 400);
}

#[test]
fn a_team_and_an_account_end_with_what_they_have() {
    let mut stage = Stage::new();
    let admin = stage.person(ADMIN);
    stage.add_host(&admin, "10.0.0.1:50051", 4096);
    let owner = stage.person("owner@example.com");
    let auth = ("authorization", owner.as_str());
    let key = stage.api_key(&owner);
    assert_eq!(stage.request(Post, "/v1/capsules", ("x-api-key", &key), "{}").status, 201);
    let team = text(&json(&stage.request(Get, "/v1/teams", auth, ""))[0]["id"]);
    stage.person("member@example.com");
    let members = format!("/v1/teams/{team}/members");
    let added = stage.request(Post, &members, auth, r#"{"email":"member@example.com"}"#);

    let wrong = r#"{"confirmation":"somebody@example.com"}"#;
    assert_eq!(stage.request(Delete, "/v1/me", auth, wrong).status, 400);
    let right = r#"{"confirmation":"Owner@example.com"}"#;
    assert_eq!(error(&stage.request(Delete, "/v1/me", auth, right)).1, "conflict");
    let member = format!("{members}/{}", text(&json(&added)["user_id"]));
    assert_eq!(stage.request(Delete, &member, auth, "").status, 204);
    assert_eq!(stage.request(Delete, "/v1/me", auth, right).status, 204);

    assert_eq!(stage.request(Get, "/v1/me", auth, "").status, 401);
    assert_eq!(stage.request(Get, "/v1/capsules", ("x-api-key", &key), "").status, 401);
    assert_eq!(stage.login("owner@example.com", crate::stage::PASSWORD).status, 401);
    crate::postgres::client(&stage.url)
        .execute("update capsules set last_updated = last_updated - interval '1 hour'", &[])
        .expect("update");
    stage.run_jobs();
    assert!(stage.hosts[0].capsules.is_empty(), "its capsules are destroyed");
    // The address is free again.
    stage.person("owner@example.com");
}
