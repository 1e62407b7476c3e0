//! The command line: one command a run, one report, one exit code.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::{Value, json};
use vendor_check::check::{self, Places, Tree};
use vendor_check::date::Date;
use vendor_check::failure::{Class, Finding, Report, Result};
use vendor_check::sbom::Material;
use vendor_check::{advisories, dependencies, files, inputs, inventory, lock, release, vendor};

mod arguments;

use arguments::Arguments;

const USAGE: &str = "\
usage: vendor-check [OPTION...] COMMAND

  check                        everything but binaries and releases
  verify                       integrity only: lock, archives, vendor/, configuration
  vendor --from DIR            keep the archives of Cargo.lock found in DIR, make vendor/ from them
  inventory                    write inventory.json for this tree, to be reviewed
  tree-hashes                  print the hash of every crate's tree, for audits.json
  tighten                      lower the budgets of policy.json to what is counted
  notice FILE | --check FILE   write NOTICE, or compare it
  sbom DIR | --check DIR [--created TIME]
                               write (or compare) CycloneDX and SPDX for every shipped binary; binaries found in
                               --binaries DIR are hashed into them
  embed BINARY OUT             copy a binary with its dependency list inside
  binary FILE...               compare the list inside binaries (by their file names) with the lock
  list FILE                    print the list inside any binary
  advisories-import DIR --source TEXT --date DAY --sequence N
                               make advisories.json of a checkout of the RustSec database
  inputs DIR                   check kernel, images and tools below DIR against inputs.json
  release-manifest DIR --key FILE --release VERSION [--inputs DIR]
                               write and sign DIR/release.json
  verify-release DIR --key FILE
                               verify it
  classes                      print the failure classes and their exit codes

options: --root DIR (.), --archives DIR (ROOT/dist/crates), --vendor DIR (ROOT/vendor),
  --judgements DIR (ROOT/vendor-check), --cargo-home DIR, --today DAY, --json
";

fn main() -> ExitCode {
    let started = Instant::now();
    let mut report = Report::default();
    let arguments = Arguments::parse(std::env::args_os().skip(1));
    // Also for words that are not understood.
    let json = std::env::args_os().any(|word| word == "--json");
    match arguments {
        Ok(arguments) => {
            if let Err(finding) = run(&arguments, &mut report) {
                report.findings.push(finding);
            }
        }
        Err(finding) => {
            eprint!("{USAGE}");
            report.findings.push(finding);
        }
    }
    report.facts.insert("elapsed_ms".into(), json!(started.elapsed().as_millis() as u64));
    if json {
        println!("{}", report.to_json())
    } else {
        print_for_people(&report)
    }
    ExitCode::from(report.exit_code())
}

fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let places = arguments.places();
    let variables: Vec<String> =
        std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
    match arguments.command.as_str() {
        "check" => check::full(&places, &variables, arguments.today()?, report),
        "verify" => {
            check::verify(&places, &variables, report);
        }
        "vendor" => make_vendor(&places, &arguments.option("from")?, report)?,
        "inventory" => {
            if let Some(tree) = check::verify(&places, &variables, report) {
                let text = inventory::to_text(&tree.inventory());
                files::write(&places.judgements.join("inventory.json"), text.as_bytes())?;
            }
        }
        "tree-hashes" => {
            if let Some(tree) = check::verify(&places, &variables, report) {
                report.facts.insert("tree_hashes".into(), by_name(tree.tree_hashes()));
            }
        }
        "tighten" => tighten(&places, &variables, report)?,
        "notice" => notice(arguments, &places, report)?,
        "sbom" => sbom(arguments, &places, report)?,
        "embed" => embed(arguments, &places, report)?,
        "binary" => binary(arguments, &places, report)?,
        "list" => {
            let path = arguments.operand(0)?;
            let list = dependencies::extract(&files::read(&path)?, &path.display().to_string())?;
            report.facts.insert("list".into(), list);
        }
        "advisories-import" => {
            let bad = |what| Finding::new(Class::Usage, "advisories-import", what);
            let date = arguments.text("date")?;
            let date = Date::parse(&date).ok_or_else(|| bad("--date must be YYYY-MM-DD"))?;
            let sequence =
                arguments.text("sequence")?.parse().map_err(|_| bad("--sequence must be a number"))?;
            let text =
                advisories::import(&arguments.operand(0)?, &arguments.text("source")?, date, sequence)?;
            files::write(&places.judgements.join("advisories.json"), text.as_bytes())?;
        }
        "inputs" => {
            check_inputs(&places, &arguments.operand(0)?, report)?;
        }
        "release-manifest" => {
            let key = release::read_key(&arguments.option("key")?)?;
            let present = match arguments.optional("inputs") {
                Some(directory) => check_inputs(&places, &directory, report)?,
                None => Vec::new(),
            };
            if report.findings.is_empty() {
                release::sign(&arguments.operand(0)?, &key, &arguments.text("release")?, &present, report);
            }
        }
        "verify-release" => {
            let key = release::read_key(&arguments.option("key")?)?;
            release::verify(&arguments.operand(0)?, &key, report);
        }
        "classes" => {
            for class in Class::ALL {
                println!("{:>3}  {:<20} {}", class.code(), class.slug(), class.meaning());
            }
        }
        other => {
            eprint!("{USAGE}");
            return Err(Finding::new(Class::Usage, other, "there is no such command"));
        }
    }
    Ok(())
}

fn by_name<V: Into<Value>>(map: std::collections::BTreeMap<lock::CrateId, V>) -> Value {
    Value::Object(map.into_iter().map(|(id, value)| (id.to_string(), value.into())).collect())
}

fn check_inputs(places: &Places, directory: &Path, report: &mut Report) -> Result<Vec<(String, String)>> {
    let inputs = inputs::parse(&files::read(&places.judgements.join("inputs.json"))?)?;
    let present = inputs::check(&inputs, directory, report);
    let facts: serde_json::Map<String, Value> =
        present.iter().map(|(name, hash)| (name.clone(), json!(hash))).collect();
    report.facts.insert("inputs".into(), Value::Object(facts));
    Ok(present)
}

/// Copies the archives of the lock out of `from` (and its direct subdirectories: Cargo's cache has
/// one for each registry), and makes `vendor/` anew.
fn make_vendor(places: &Places, from: &Path, report: &mut Report) -> Result<()> {
    let policy = files::read(&places.judgements.join("policy.json"))?;
    let policy = vendor_check::policy::Policy::parse(&policy)?;
    let workspace = vendor_check::manifest::of_workspace(&places.root, report)?;
    let text = files::read_text(&places.root.join("Cargo.lock"))?;
    let members = workspace.members.keys().cloned().collect();
    let lock = lock::read(&text, &policy.registry, &members, report);
    let io = |error: std::io::Error| files::io_error("make it", &places.archives, &error);
    let mut sources = vec![from.to_owned()];
    for path in files::list(from)? {
        if files::kind(&path)? == files::Kind::Directory {
            sources.push(path);
        }
    }
    // Anew, so that what an earlier lock had does not stay.
    if places.archives.exists() {
        std::fs::remove_dir_all(&places.archives).map_err(io)?;
    }
    std::fs::create_dir_all(&places.archives).map_err(io)?;
    for (id, _) in lock.external() {
        let name = format!("{}.crate", id.directory());
        if let Some(source) =
            sources.iter().map(|directory| directory.join(&name)).find(|path| path.is_file())
        {
            let target = places.archives.join(&name);
            std::fs::copy(&source, &target).map_err(|error| files::io_error("copy it", &target, &error))?;
        }
    }
    let archives = vendor_check::archive::load_all(&places.archives, &lock, report);
    if report.findings.is_empty() {
        vendor::write(&places.vendor, &archives)?;
        report.facts.insert("archives".into(), json!(archives.len()));
    }
    Ok(())
}

fn tighten(places: &Places, variables: &[String], report: &mut Report) -> Result<()> {
    let Some(tree) = check::verify(places, variables, report) else { return Ok(()) };
    let mut counted = check::count_all(&tree, &tree.inventory())?;
    counted.insert("Cargo.lock".into(), [("crates".into(), tree.archives.len() as u64)].into());
    let path = places.judgements.join("policy.json");
    let mut policy: Value = serde_json::from_slice(&files::read(&path)?)
        .map_err(|error| Finding::new(Class::PolicyMalformed, "policy.json", error.to_string()))?;
    for budget in policy.get_mut("budgets").and_then(Value::as_array_mut).into_iter().flatten() {
        let field = |key: &str| budget.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let count = counted.get(&field("binary")).and_then(|counts| counts.get(&field("what")));
        let limit = budget.get("limit").and_then(Value::as_u64).unwrap_or(0);
        if let Some(&count) = count.filter(|count| **count < limit) {
            report.notes.push(format!("{} {}: {limit} -> {count}", field("binary"), field("what")));
            // What was reviewed goes down too: the way back up is a review.
            budget["limit"] = json!(count);
            budget["reviewed"] = json!(count);
        }
    }
    let mut text = serde_json::to_string_pretty(&policy).unwrap_or_default();
    text.push('\n');
    files::write(&path, text.as_bytes())
}

/// The tree for evidence: its archives must be the lock's.
fn tree(places: &Places, report: &mut Report) -> Option<Tree> {
    let tree = check::load(places, report)?;
    report.findings.is_empty().then_some(tree)
}

fn notice(arguments: &Arguments, places: &Places, report: &mut Report) -> Result<()> {
    let Some(tree) = tree(places, report) else { return Ok(()) };
    let licences = tree.licences(report);
    let text = tree.notice(&licences)?;
    match arguments.optional("check") {
        None => files::write(&arguments.operand(0)?, text.as_bytes()),
        Some(path) => {
            if files::read(&path)? != text.as_bytes() {
                report.fail(
                    Class::NoticeStale,
                    path.display().to_string(),
                    "it is not what this tree gives: make it anew",
                );
            }
            Ok(())
        }
    }
}

fn sbom(arguments: &Arguments, places: &Places, report: &mut Report) -> Result<()> {
    let compare = arguments.optional("check");
    let directory = match &compare {
        Some(directory) => directory.clone(),
        None => arguments.operand(0)?,
    };
    let created = arguments.optional_text("created").unwrap_or_else(|| "1970-01-01T00:00:00Z".into());
    let Some(tree) = tree(places, report) else { return Ok(()) };
    let licences = tree.licences(report);
    std::fs::create_dir_all(&directory).map_err(|error| files::io_error("make it", &directory, &error))?;
    for (binary, package) in tree.policy.binaries() {
        let binary = binary.name.as_str();
        let graph = tree.graph(binary)?;
        let file = arguments.optional("binaries").map(|directory| directory.join(binary));
        let hash = match file.filter(|file| file.exists()) {
            Some(file) => Some(vendor_check::codec::sha256(&files::read(&file)?)),
            None => None,
        };
        let own_licence =
            tree.workspace.members.get(package).and_then(|manifest| manifest.license.as_deref());
        let material = Material {
            binary,
            binary_sha256: hash.as_deref(),
            graph: &graph,
            lock: &tree.lock,
            licences: &licences,
            lock_sha256: &tree.lock_sha256,
            created: &created,
            own_licence: own_licence.unwrap_or("NOASSERTION"),
        };
        for (suffix, document) in [("cdx.json", material.cyclonedx()), ("spdx.json", material.spdx())] {
            let path = directory.join(format!("{binary}.{suffix}"));
            let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
            text.push('\n');
            if compare.is_some() {
                if files::read(&path)? != text.as_bytes() {
                    report.fail(
                        Class::SbomStale,
                        path.display().to_string(),
                        "it is not what this tree gives",
                    );
                }
            } else {
                files::write(&path, text.as_bytes())?;
            }
        }
    }
    Ok(())
}

fn binary_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn embed(arguments: &Arguments, places: &Places, report: &mut Report) -> Result<()> {
    let (from, to) = (arguments.operand(0)?, arguments.operand(1)?);
    let Some(tree) = tree(places, report) else { return Ok(()) };
    let list = dependencies::list(&tree.graph(&binary_name(&from))?, &tree.lock);
    let bytes = dependencies::embed(&files::read(&from)?, &list, &from.display().to_string())?;
    files::write(&to, &bytes)?;
    let mode =
        std::fs::metadata(&from).map_err(|error| files::io_error("look at it", &from, &error))?.permissions();
    std::fs::set_permissions(&to, mode).map_err(|error| files::io_error("set its mode", &to, &error))
}

fn binary(arguments: &Arguments, places: &Places, report: &mut Report) -> Result<()> {
    arguments.operand(0)?;
    let Some(tree) = tree(places, report) else { return Ok(()) };
    for path in &arguments.operands {
        let subject = path.display().to_string();
        let expected = dependencies::list(&tree.graph(&binary_name(path))?, &tree.lock);
        let found = files::read(path).and_then(|bytes| dependencies::extract(&bytes, &subject));
        if let Some(found) = report.take(found) {
            let differences = report.take(dependencies::compare(&found, &expected, &subject));
            report.findings.extend(differences.unwrap_or_default());
        }
    }
    Ok(())
}

fn print_for_people(report: &Report) {
    for note in &report.notes {
        println!("note: {note}");
    }
    let elapsed = report.facts.get("elapsed_ms").and_then(Value::as_u64).unwrap_or(0);
    for (name, fact) in report.facts.iter().filter(|(name, _)| *name != "elapsed_ms") {
        match fact {
            Value::Object(map) => {
                for (key, value) in map {
                    match value {
                        Value::Array(items) => println!("{name}: {key}: {} {}", items.len(), join(items)),
                        value => println!("{name}: {key}: {value}"),
                    }
                }
            }
            Value::Array(items) => println!("{name}: {} {}", items.len(), join(items)),
            value => println!("{name}: {value}"),
        }
    }
    let mut findings = report.findings.clone();
    findings.sort();
    for finding in &findings {
        eprintln!("FAIL {finding}");
    }
    if findings.is_empty() {
        println!("ok ({elapsed} ms)");
    } else {
        eprintln!("{} failure(s), exit code {} ({elapsed} ms)", findings.len(), report.exit_code());
    }
}

fn join(items: &[Value]) -> String {
    let items: Vec<String> =
        items.iter().map(|item| item.as_str().map_or_else(|| item.to_string(), str::to_owned)).collect();
    format!("({})", items.join(", "))
}
