//! Bills of materials of one binary: CycloneDX 1.6 and SPDX 2.3, both JSON. The same tree gives the
//! same bytes: identifiers come from hashes, and the time is the one that the caller states.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::codec::sha256;
use crate::licence::Licence;
use crate::lock::{CrateId, Lock};
use crate::resolve::Graph;

/// What an SBOM is made of.
pub struct Material<'a> {
    /// The binary's name.
    pub binary: &'a str,
    /// The SHA-256 of the binary, where there is one.
    pub binary_sha256: Option<&'a str>,
    /// What is compiled into it.
    pub graph: &'a Graph,
    /// The lock, for the archives' hashes.
    pub lock: &'a Lock,
    /// Licences of the crates.
    pub licences: &'a BTreeMap<CrateId, Licence>,
    /// The SHA-256 of the whole lock: what the identifiers derive from.
    pub lock_sha256: &'a str,
    /// The time of the release, RFC 3339 in UTC.
    pub created: &'a str,
    /// The licence of the project's own packages.
    pub own_licence: &'a str,
}

const TOOL: &str = "vendor-check";
const TOOL_VERSION: &str = env!("CARGO_PKG_VERSION");

impl Material<'_> {
    /// A package URL (purl-spec, type cargo).
    fn purl(id: &CrateId) -> String {
        format!("pkg:cargo/{}@{}", id.name, id.version.replace('+', "%2B"))
    }

    fn licence(&self, id: &CrateId) -> String {
        match self.licences.get(id) {
            Some(licence) => licence.expression.to_spdx(),
            None => self.own_licence.to_owned(),
        }
    }

    fn checksum(&self, id: &CrateId) -> Option<&str> {
        self.lock.packages.get(id)?.checksum.as_deref()
    }

    /// A name-based identifier of the form of a UUID (RFC 9562, version 8).
    fn uuid(&self, kind: &str) -> String {
        let seed =
            format!("{kind}\n{}\n{}\n{}\n{}", self.binary, self.graph.root, self.lock_sha256, self.created);
        let hash = sha256(format!("{seed}\n{}", self.binary_sha256.unwrap_or_default()).as_bytes());
        format!("{}-{}-8{}-8{}-{}", &hash[..8], &hash[8..12], &hash[12..15], &hash[15..18], &hash[18..30])
    }

    /// The CycloneDX document.
    pub fn cyclonedx(&self) -> Value {
        let component = |id: &CrateId, build_only: bool| {
            let mut component = json!({
                "type": "library",
                "bom-ref": Self::purl(id),
                "name": id.name,
                "version": id.version,
                "purl": Self::purl(id),
                "licenses": [{ "expression": self.licence(id) }],
                "scope": if build_only { "excluded" } else { "required" },
            });
            if let Some(checksum) = self.checksum(id) {
                component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
            }
            component
        };
        let crates = self.graph.crates();
        let root = &self.graph.root;
        let mut main = component(root, false);
        main["type"] = json!("application");
        main["name"] = json!(self.binary);
        if let Some(map) = main.as_object_mut() {
            map.remove("scope");
        }
        if let Some(hash) = self.binary_sha256 {
            main["hashes"] = json!([{ "alg": "SHA-256", "content": hash }]);
        }
        let components: Vec<Value> =
            crates.iter().filter(|(id, _)| **id != root).map(|(id, build)| component(id, *build)).collect();
        let dependencies: Vec<Value> = crates
            .keys()
            .map(|id| {
                let on: Vec<String> = self.graph.dependencies(id).into_iter().map(Self::purl).collect();
                json!({ "ref": Self::purl(id), "dependsOn": on })
            })
            .collect();
        json!({
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": format!("urn:uuid:{}", self.uuid("cyclonedx")),
            "version": 1,
            "metadata": {
                "timestamp": self.created,
                "tools": { "components": [{ "type": "application", "name": TOOL, "version": TOOL_VERSION }] },
                "component": main,
            },
            "components": components,
            "dependencies": dependencies,
        })
    }

    fn spdx_id(id: &CrateId) -> String {
        // SPDX identifiers have letters, digits, '.' and '-' only (SPDX 2.3, 7.2).
        let clean: String = format!("{}-{}", id.name, id.version)
            .chars()
            .map(|c| match c {
                '_' => '.',
                '+' => '-',
                c => c,
            })
            .collect();
        format!("SPDXRef-Package-{clean}")
    }

    /// The SPDX document.
    pub fn spdx(&self) -> Value {
        let crates = self.graph.crates();
        let packages: Vec<Value> = crates
            .keys()
            .map(|id| {
                let mut package = json!({
                    "SPDXID": Self::spdx_id(id),
                    "name": if **id == self.graph.root { self.binary } else { &id.name },
                    "versionInfo": id.version,
                    "downloadLocation": "NOASSERTION",
                    "filesAnalyzed": false,
                    "licenseConcluded": "NOASSERTION",
                    "licenseDeclared": self.licence(id),
                    "copyrightText": "NOASSERTION",
                    "primaryPackagePurpose": if **id == self.graph.root { "APPLICATION" } else { "LIBRARY" },
                    "externalRefs": [{
                        "referenceCategory": "PACKAGE-MANAGER",
                        "referenceType": "purl",
                        "referenceLocator": Self::purl(id),
                    }],
                });
                let hash = if **id == self.graph.root { self.binary_sha256 } else { self.checksum(id) };
                if let Some(hash) = hash {
                    package["checksums"] = json!([{ "algorithm": "SHA256", "checksumValue": hash }]);
                }
                package
            })
            .collect();
        let relation = |from: &str, kind: &str, to: &str| json!({ "spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to });
        let mut relations = vec![relation("SPDXRef-DOCUMENT", "DESCRIBES", &Self::spdx_id(&self.graph.root))];
        for id in crates.keys() {
            for dependency in self.graph.dependencies(id) {
                let build_only = crates.get(dependency).copied().unwrap_or(false);
                if build_only {
                    relations.push(relation(
                        &Self::spdx_id(dependency),
                        "BUILD_DEPENDENCY_OF",
                        &Self::spdx_id(id),
                    ));
                } else {
                    relations.push(relation(&Self::spdx_id(id), "DEPENDS_ON", &Self::spdx_id(dependency)));
                }
            }
        }
        json!({
            "spdxVersion": "SPDX-2.3",
            "dataLicense": "CC0-1.0",
            "SPDXID": "SPDXRef-DOCUMENT",
            "name": format!("{}-{}", self.binary, self.graph.root.version),
            "documentNamespace": format!("urn:uuid:{}", self.uuid("spdx")),
            "creationInfo": {
                "created": self.created,
                "creators": [format!("Tool: {TOOL}-{TOOL_VERSION}")],
            },
            "packages": packages,
            "relationships": relations,
        })
    }
}
