//! Huge pages of a pod (`hugepages-2Mi`, an emptyDir of medium HugePages): memory of the guest.

use coffer_tests::bundle::Bundle;
use coffer_tests::{Test, host};
use serde_json::json;
use std::fs;

const MIB: i64 = 1 << 20;

/// Four pages, in the hugetlbfs that a kubelet mounts; there need be none on the host.
#[test]
fn a_container_has_the_huge_pages_of_its_limit() {
    let test = Test::new("huge");
    let point = test.dir().join("pages");
    fs::create_dir(&point).unwrap();
    let point = point.to_str().unwrap();
    host(
        "mount",
        &[
            "-t",
            "hugetlbfs",
            "-o",
            "pagesize=2M,mode=0711,gid=7",
            "none",
            point,
        ],
    )
    .unwrap();
    let script = "awk '/HugePages_Total/ {print $2}' /proc/meminfo; stat -c '%a %g' /huge; stat -f -c %s /huge
        fallocate -l 6291456 /huge/three && echo three; fallocate -l 4194304 /huge/two 2>/dev/null || echo no more";
    let mut bundle = Bundle::on(&test, &test.copy_of("busybox"), &["/bin/sh", "-c", script]);
    let limits = json!([{"pageSize": "2MB", "limit": 8 * MIB}, {"pageSize": "1GB", "limit": 0}]);
    bundle.config["linux"]["resources"]["hugepageLimits"] = limits;
    let options = ["rbind", "rprivate", "rw"];
    let mount =
        json!({"destination": "/huge", "type": "bind", "source": point, "options": options});
    bundle.push("/mounts", mount);
    let done = bundle.run(&test);
    host("umount", &[point]).unwrap();
    assert_eq!(
        done.text(),
        "4\n711 7\n2097152\nthree\nno more",
        "{}",
        done.stderr
    );
}

#[test]
fn more_huge_pages_than_the_vm_has_memory_are_refused() {
    let test = Test::new("huge-many");
    let mut bundle = Bundle::new(&test, "true");
    let limits = json!([{"pageSize": "2MB", "limit": 1024 * 1024 * MIB}]);
    bundle.config["linux"]["resources"]["hugepageLimits"] = limits;
    let done = bundle.run(&test);
    assert_eq!(done.code, 125);
    let expected = "huge pages of 2MB: the memory of the VM has room for";
    assert!(done.stderr.contains(expected), "{}", done.stderr);
}
