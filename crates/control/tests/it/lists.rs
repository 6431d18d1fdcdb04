//! Lists: page by page, from logs alone, and nothing is taken or written for them.

use varve_api::Code;
use varve_control::arguments::Page;
use varve_control::ports::Pageserver as _;
use varve_storage::ids::TimelineId;
use varve_storage::tenant_log::{Ancestor, TenantEdit, TimelineFacts};

use crate::pageserver::TEMPLATE_END;
use crate::world::{World, code, server};

fn page(prefix: &str, cursor: Option<&str>, limit: usize) -> Page {
    Page::parse(Some(prefix), cursor, Some(limit)).unwrap()
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_branches_come_in_pages() {
    let world = World::with_tenant().await;
    let parent = world.timeline("main").await;
    let log = world.pageserver.owned(world.tenant_id().await).unwrap();
    for hundred in 0..100u32 {
        let edits = (0..100u32).flat_map(|one| {
            let number = hundred * 100 + one;
            let mut id = [7; 16];
            id[..4].copy_from_slice(&number.to_be_bytes());
            let ancestor = Some(Ancestor { timeline: parent, lsn: TEMPLATE_END });
            let facts = TimelineFacts { id: TimelineId(id), ancestor, tli: number + 2, start: TEMPLATE_END, created: 0 };
            let name = format!("b{number:05}").parse().unwrap();
            [TenantEdit::Timeline(facts), TenantEdit::Branch { name, timeline: TimelineId(id) }]
        });
        log.push(edits.collect()).await.unwrap();
    }
    // A server that owns nothing.
    let (pageserver, plane) = server(&world.store, "b");
    let objects = world.objects.objects();
    let (mut names, mut cursor, mut pages) = (Vec::new(), None, 0);
    while pages == 0 || cursor.is_some() {
        let listed = plane.list_branches("acme", &page("", cursor.as_deref(), 1000)).await.unwrap();
        names.extend(listed.items.iter().map(|branch| branch.name.clone()));
        pages += 1;
        cursor = listed.next;
    }
    assert_eq!((names.len(), pages), (10_001, 11));
    assert!(names.is_sorted() && names.last().unwrap() == "main");
    let some = plane.list_branches("acme", &page("b0012", None, 7)).await.unwrap();
    assert_eq!((some.items.len(), some.items[0].name.as_str()), (7, "b00120"));
    let rest = plane.list_branches("acme", &page("b0012", some.next.as_deref(), 7)).await.unwrap();
    assert_eq!((rest.items.len(), rest.next), (3, None));
    assert_eq!(rest.items[0].last_lsn, TEMPLATE_END.to_string(), "one that nobody wrote ends where it begins");
    plane.show_branch("acme", "b00001").await.unwrap();
    assert_eq!(plane.show_branch("acme", &parent.to_string()).await.unwrap().name, "main", "by its timeline's id");
    plane.list_branch_computes("acme", "main").await.unwrap();
    assert_eq!(world.objects.objects(), objects, "nothing was written");
    assert!(pageserver.asked.lock().is_empty(), "nothing was taken");
}

#[tokio::test(start_paused = true)]
async fn two_thousand_tenants_come_in_pages_and_none_is_taken() {
    let world = World::new().await;
    for number in 0..2000 {
        world.create(&format!("t{number:04}")).await;
    }
    let (pageserver, plane) = server(&world.store, "b");
    let objects = world.objects.objects();
    let (mut names, mut cursor, mut pages) = (Vec::new(), None, 0);
    while pages == 0 || cursor.is_some() {
        let listed = plane.list_tenants(&page("", cursor.as_deref(), 300)).await.unwrap();
        names.extend(listed.items.iter().map(|tenant| (tenant.name.clone(), tenant.branches)));
        pages += 1;
        cursor = listed.next;
    }
    assert_eq!((names.len(), pages), (2000, 7));
    assert!(names.is_sorted() && names.iter().all(|(_, branches)| *branches == 1));
    assert_eq!(plane.list_tenants(&page("t000", None, 100)).await.unwrap().items.len(), 10);
    let by_name = plane.show_tenant("t0007").await.unwrap();
    assert_eq!(plane.show_tenant(&by_name.id).await.unwrap().name, "t0007");
    assert_eq!(world.objects.objects(), objects, "nothing was written");
    assert!(pageserver.asked.lock().is_empty(), "nothing was taken");
}

#[tokio::test(start_paused = true)]
async fn a_tenant_whose_log_is_damaged_does_not_hide_the_others() {
    let world = World::new().await;
    for name in ["a", "b", "c"] {
        world.create(name).await;
    }
    let id = world.plane.show_tenant("b").await.unwrap().id;
    let log = format!("tenants/{id}/log");
    let damaged = world.objects.objects().into_keys().find(|name| name.as_str().starts_with(&log)).unwrap();
    world.objects.set(&damaged, Some(bytes::Bytes::from_static(b"nonsense")));
    let (_, plane) = server(&world.store, "b");
    let listed = plane.list_tenants(&Page::default()).await.unwrap().items;
    let shown: Vec<(&str, bool)> = listed.iter().map(|tenant| (tenant.name.as_str(), tenant.problem.is_some())).collect();
    assert_eq!(shown, [("a", false), ("b", true), ("c", false)]);
    assert_eq!(code(plane.show_tenant("b").await), Code::Internal);
}
